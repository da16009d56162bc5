"""What PPO is made of: its rollout, its networks and optimizers, and the room that its replay takes.

Shapes: T steps of a rollout, B environments, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gravitar_dqn.agents.auxiliary_tasks import make_task_heads, task_weights
from gravitar_dqn.config import PPORunConfig, PPOSettings
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import ActorCritic, make_actor_critic
from gravitar_dqn.rnd import make_rnd_networks
from gravitar_dqn.runtime.memory import check_buffer_fits

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rollout:
    """What is kept of a rollout beside its rows in the replay buffer, on tensors that stay where they are."""

    indices: Tensor  # (T + 1, B) int64, flat position in the buffer of every frame; the last is after the rollout
    log_probs: Tensor  # (T, B) of the actions, when they were chosen
    values_ext: Tensor  # (T + 1, B) of the score
    values_int: Tensor  # (T + 1, B) of the bonus
    valid: Tensor  # (T * B,) 1 where an action was really played
    advantages: Tensor  # (T * B,)
    returns_ext: Tensor  # (T * B,)
    returns_int: Tensor  # (T * B,)
    features: Tensor  # (T * B, D) of RND's target, for the frames that the actions led to

    @staticmethod
    def empty(num_steps: int, num_envs: int, features: int, device: torch.device) -> Rollout:
        """Zeros of these shapes."""
        rows, zeros = num_steps * num_envs, partial(torch.zeros, device=device)
        return Rollout(
            indices=torch.zeros((num_steps + 1, num_envs), dtype=torch.int64, device=device),
            log_probs=zeros(num_steps, num_envs),
            values_ext=zeros(num_steps + 1, num_envs),
            values_int=zeros(num_steps + 1, num_envs),
            valid=zeros(rows),
            advantages=zeros(rows),
            returns_ext=zeros(rows),
            returns_int=zeros(rows),
            features=zeros(rows, features),
        )

    @property
    def before(self) -> Tensor:
        """Flat indices (T * B,) of the frames that the actions were chosen on."""
        return self.indices[:-1].reshape(-1)

    @property
    def after(self) -> Tensor:
        """Flat indices (T * B,) of the frames that the actions led to."""
        return self.indices[1:].reshape(-1)


@dataclass(frozen=True)
class Networks:
    """All that learns."""

    policy: ActorCritic
    heads: nn.ModuleDict  # of the auxiliary tasks
    rnd: tuple[nn.Module, nn.Module] | None  # frozen target and predictor; None without curiosity


def make_networks(config: PPORunConfig, spec: EnvSpec) -> Networks:
    """Those of the presets."""
    policy = make_actor_critic(spec)
    heads = make_task_heads(task_weights(config.tasks), spec, policy.dense_size)
    return Networks(policy, heads, make_rnd_networks(spec) if config.rnd.coef != 0 else None)


def optimizer_maker(settings: PPOSettings) -> MakeOptimizer:
    """How the settings ask for an optimizer."""
    if settings.optimizer == "adam":
        return lambda parameters: torch.optim.Adam(parameters, settings.learning_rate, fused=True)
    return lambda parameters: torch.optim.RMSprop(parameters, settings.learning_rate, eps=1e-5)


def replay_steps(config: PPORunConfig) -> int:
    """Steps of every environment that the replay buffer keeps: for the tasks, or the rollout alone."""
    steps = config.agent.num_steps
    return max(config.tasks.replay_length, steps) if any(task_weights(config.tasks).values()) else steps


def check_replay_fits(config: PPORunConfig, spec: EnvSpec, device: torch.device) -> None:
    """Log the replay buffer's size before it is allocated; UserError when it would not fit."""
    steps, num_envs = replay_steps(config), config.env.num_envs
    setting = "--agent.num-steps" if steps == config.agent.num_steps else "--tasks.replay-length"
    check_buffer_fits(steps * num_envs, spec.frame_shape, spec.frame_dtype, device, setting, num_envs)
