"""RANDAL by its published names: a description of what learns and how, made into an agent by its trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.agents.auxiliary_tasks import make_task_heads
from gravitar_dqn.agents.rollout import Networks
from gravitar_dqn.envs.spec import RAM_BYTES, EnvSpec
from gravitar_dqn.errors import UserError
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.rnd import normalize_frames
from gravitar_dqn.runtime.execution import choose_device

PPOIntrinsic = ActorCritic


@dataclass(frozen=True)
class PPOConfig:
    """How RANDAL's policy learns."""

    lr: float = 1e-4
    """The optimizer's learning rate at the start."""
    lr_final: float = 1e-4
    """After decay_steps."""
    decay_steps: int = 0
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    grad_clip: float = 0.5
    """Gradients of policy, predictor and every task are clipped to this norm, each alone; 0 never clips."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    entropy_coeff: float = 0.01
    """Weight of the policy's entropy."""
    policy_clip: float = 0.1
    """The policy's ratio is clipped to 1 +- this."""


class RANDAL:
    """What a trainer trains: networks, their optimizers, and how they learn.

    Args:
        policy_model: class of the policy's trunk, such as `NatureCNN` or `MLP`; its instances have `dense_size`.
        target_model: class of curiosity's networks, such as `PredictorCNN` or `PredictorMLP`.
        input_size: shape of an observation, (4, 84, 84) or (n,).
        action_size: number of actions.
        config: how the policy learns.
        pixel_control: whether to build that task; pictures only.
        intr_coeff, extr_coeff: weights of intrinsic and extrinsic advantages; intr_coeff 0 builds no curiosity.
        RP, VR, PC: weights of the gradients of reward prediction, value replay and pixel control, each clipped alone; 0
            builds no head and does no work.
        policy_args, RND_args: further arguments of the two classes.
        optim, optim_args: the optimizers' class, and its arguments beside the learning rate.
    """

    def __init__(
        self,
        policy_model: type[nn.Module],
        target_model: type[nn.Module],
        input_size: tuple[int, ...],
        action_size: int,
        config: PPOConfig,
        *,
        pixel_control: bool = True,
        intr_coeff: float = 0.5,
        extr_coeff: float = 1.0,
        RP: float = 1.0,
        VR: float = 1.0,
        PC: float = 1.0,
        policy_args: Mapping[str, Any] | None = None,
        RND_args: Mapping[str, Any] | None = None,
        optim: type[torch.optim.Optimizer] = torch.optim.Adam,
        optim_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.device = config, choose_device(config.device)
        self.input_size, self.spec = tuple(input_size), spec_for(input_size, action_size)
        self.intr_coeff, self.extr_coeff = intr_coeff, extr_coeff
        self.weights = {"pixel_control": PC if pixel_control else 0.0, "reward_prediction": RP, "value_replay": VR}
        policy = ActorCritic(policy_model, input_size, action_size, **(policy_args or {}))
        heads = make_task_heads(self.weights, self.spec, policy.dense_size)
        rnd: tuple[nn.Module, nn.Module] | None = None
        if intr_coeff != 0:
            make: Any = target_model
            arguments = {**(RND_args or {})}
            target = make(self.spec.newest_shape, trainable=False, **arguments).to(self.device)
            rnd = target, make(self.spec.newest_shape, trainable=True, **arguments).to(self.device)
        self.networks = Networks(policy.to(self.device), heads.to(self.device), rnd)
        self.pixel_range = torch.tensor([255.0, 0.0], device=self.device)  # darkest and brightest pixel seen: none yet
        self._optim: Any = optim
        self._optim_args = dict(optim_args or {})

    @property
    def policy(self) -> ActorCritic:
        """The network that acts."""
        return self.networks.policy

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer as it was asked for."""
        optimizer: torch.optim.Optimizer = self._optim(parameters, lr=self.config.lr, **self._optim_args)
        return optimizer

    @property
    def optimizer_name(self) -> Literal["adam", "rmsprop"]:
        """Of the settings in config.json."""
        return "rmsprop" if issubclass(self._optim, torch.optim.RMSprop) else "adam"

    def norm_obs(self, obs: Tensor) -> Tensor:
        """Frames scaled to [0, 1] by the darkest and the brightest pixel seen; one pair for the whole frame."""
        return losses.scale_between(obs, self.pixel_range)

    @staticmethod
    def pixel_loss(Qaux: Tensor, Qaux_actions: Tensor, Qaux_target: Tensor) -> Tensor:
        """Half the mean squared error of the chosen actions' cells: (N, A, 21, 21), (N,) int64, (N, 21, 21)."""
        return losses.pixel_control_loss(Qaux, Qaux_actions, Qaux_target)

    def predictor_loss(self, next_states: Tensor, state_mean: Tensor, state_std: Tensor) -> Tensor:
        """Mean squared RND error of frames (N, 1, 84, 84) or (N, n), 0..255. A gradient step takes a share of them."""
        if self.networks.rnd is None:
            raise UserError("intr_coeff is 0: there is no predictor")
        target, predictor = self.networks.rnd
        seen = normalize_frames(next_states, state_mean, state_std)
        with torch.no_grad():
            features = target(seen).float()
        loss: Tensor = (predictor(seen).float() - features).square().mean(dim=1).mean()
        return loss


def spec_for(input_size: tuple[int, ...], action_size: int) -> EnvSpec:
    """What environments must show for networks of this size."""
    if len(input_size) == 3 or input_size[1:] == (RAM_BYTES,):
        return EnvSpec(input_size[1:], torch.uint8, action_size)
    return EnvSpec(input_size, torch.float32, action_size)
