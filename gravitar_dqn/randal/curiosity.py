"""Curiosity beside PPO, as in Burda 2018 (arXiv 1810.12894): the bonus of a whole rollout, and the predictor's loss.

Unlike `gravitar_dqn.rnd`, which pays DQN a bonus at every step, this one sees rollouts: T steps of B environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gravitar_dqn.returns import masked_mean
from gravitar_dqn.rnd import RewardForwardFilter, RunningMeanStd

TRAINED_ENVS = 32  # more environments do not train the predictor faster


class Curiosity(nn.Module):
    """The two networks and their statistics.

    Args:
        target_model: class of both networks; made with a frame's shape and `trainable`.
        frame: what curiosity sees, (1, 84, 84) or (n,).
        arguments: further ones of the networks.
    """

    forward_filter: RewardForwardFilter
    updates: Tensor

    def __init__(
        self, target_model: type[nn.Module], frame: tuple[int, ...], arguments: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.target: Any = target_model(frame, trainable=False, **(arguments or {}))
        self.predictor = target_model(frame, trainable=True, **(arguments or {}))
        self.obs_rms = RunningMeanStd(frame)
        self.reward_rms = RunningMeanStd()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # gradient steps of the predictor
        self.init_updates = 0

    def attach(self, num_envs: int, gamma: float, init_updates: int = 0) -> None:
        """Get ready for so many environments, this discount of the bonus, and none before so many gradient steps."""
        self.init_updates = init_updates
        self.forward_filter = RewardForwardFilter(num_envs, gamma).to(self.obs_rms.mean.device)
        self.share = min(1.0, TRAINED_ENVS / num_envs)

    def normalized(self, frames: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """clip((frame - mean) / std, -5, 5) of frames (N, *frame), 0..255; never divided by 255."""
        mean, std = self.obs_rms.mean if mean is None else mean, self.obs_rms.std if std is None else std
        return ((frames.float() - mean.float()) / std.float()).clamp(-5, 5)

    def errors(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared errors (N,) on normalized frames, and the target's features (N, D), which never change."""
        with torch.no_grad():
            features: Tensor = self.target(seen).float()
        return self.errors_against(seen, features), features

    def errors_against(self, seen: Tensor, features: Tensor) -> Tensor:
        """The same where the target's features are known."""
        errors: Tensor = (self.predictor(seen).float() - features).square().mean(dim=1)
        return errors

    def loss(self, errors: Tensor, generator: torch.Generator) -> Tensor:
        """Mean over a random share of the rows (N,): the paper's, which keeps the predictor's pace the same."""
        self.updates += 1
        mask = torch.rand(len(errors), device=errors.device, generator=generator) < self.share
        return masked_mean(errors, mask.float())

    @torch.no_grad()
    def rewards(self, bonus: Tensor) -> Tensor:
        """Bonuses (T, B) of a rollout in units of the standard deviation of their discounted sums along time.

        0 until the predictor has had `init_updates` gradient steps: an untrained one's errors are tens of times larger
        everywhere, which tells nothing of novelty and would set the scale for long.
        """
        ready = self.updates >= self.init_updates
        every = ready.expand(bonus.shape[1])
        sums = [self.forward_filter.update(step, every).clone() for step in bonus]
        self.reward_rms.update(torch.stack(sums).view(-1), ready.expand(bonus.numel()))
        return bonus * ready / self.reward_rms.std
