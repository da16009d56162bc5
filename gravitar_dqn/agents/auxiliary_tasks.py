"""UNREAL's auxiliary tasks (Jaderberg 2016, arXiv 1611.05397), learned off-policy from the ring of single frames.

Shapes: W windows of n steps, A actions, D features of the trunk. A window ends where its game does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.config import PPORunConfig, TaskSettings
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.errors import UserError
from gravitar_dqn.networks import ActorCritic, PixelControl, RewardPrediction
from gravitar_dqn.replay import ReplayBuffer, Windows
from gravitar_dqn.runtime import distributed

TASKS = ("pixel_control", "reward_prediction", "value_replay")


def task_weights(settings: TaskSettings) -> dict[str, float]:
    """The weight of each of TASKS."""
    return {name: float(getattr(settings, name)) for name in TASKS}


def make_task_heads(weights: Mapping[str, float], spec: EnvSpec, features: int) -> nn.ModuleDict:
    """The heads of the tasks that have a weight and need one, on a trunk with so many features."""
    heads = nn.ModuleDict()
    if weights["pixel_control"] > 0:
        if spec.kind != "picture":
            raise UserError(
                "pixel control needs pictures, not numbers: the preset randal-cartpole, or --tasks.pixel-control 0 "
                "(from Python: PC=0), goes without it"
            )
        heads["pixel_control"] = PixelControl(features, spec.num_actions)
    if weights["reward_prediction"] > 0:
        heads["reward_prediction"] = RewardPrediction(features)
    return heads


class AuxiliaryTasks(nn.Module):
    """The tasks' losses. They share the policy's trunk, and their gradients shape it.

    Args:
        config: the run's settings.
        policy: whose trunk, and whose value of the score, they learn.
        heads: of the tasks that need one.
        replay: where they sample from.
        generator: their random numbers.
    """

    pixel_range: Tensor

    def __init__(
        self,
        config: PPORunConfig,
        policy: ActorCritic,
        heads: nn.ModuleDict,
        replay: ReplayBuffer,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config, self.replay, self.generator, self.heads = config, replay, generator, heads
        self.weights = task_weights(config.tasks)
        self._policy = [policy]  # in a list, so that its parameters are not counted twice
        self.register_buffer("pixel_range", torch.tensor([255.0, 0.0]))  # darkest and brightest pixel seen

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that have a weight; the others do no work."""
        return tuple(name for name in TASKS if self.weights[name] > 0)

    @property
    def policy(self) -> ActorCritic:
        """The network they help."""
        return self._policy[0]

    @torch.no_grad()
    def update_pixel_range(self, frames: Tensor) -> None:
        """Take frames into the range of pixels."""
        low, high = frames.aminmax()
        ends = distributed.largest_of_each(torch.stack([-low.float(), high.float()]))
        self.pixel_range[0] = torch.minimum(self.pixel_range[0], -ends[0])
        self.pixel_range[1] = torch.maximum(self.pixel_range[1], ends[1])

    def norm_obs(self, obs: Tensor) -> Tensor:
        """Frames scaled to [0, 1] by the darkest and the brightest pixel seen."""
        return losses.scale_between(obs, self.pixel_range)

    def losses(self) -> dict[str, Tensor]:
        """Of every task with a weight, each on samples of its own."""
        make: dict[str, Callable[[], Tensor]] = {
            "pixel_control": self.pixel_control_loss,
            "reward_prediction": self.reward_prediction_loss,
            "value_replay": self.value_replay_loss,
        }
        return {name: make[name]() for name in self.names}

    def _windows(self) -> tuple[Windows, Tensor]:
        """Windows for one task, and the trunk's features (W * (n + 1), D) of all their frames."""
        windows = self.replay.windows(self.config.tasks.num_windows, self.generator)
        return windows, self.policy.trunk(self.replay.stacks(windows.indices.view(-1)))

    def pixel_rewards(self, windows: Windows) -> Tensor:
        """What every step of windows changed in each cell of 4x4 pixels, (W, n, 21, 21)."""
        frames = self.replay.frames[windows.indices]  # (W, n + 1, 84, 84)
        scaled = self.norm_obs(frames) if self.config.tasks.scale_pixels else frames.float() / 255
        return losses.pixel_changes(scaled)

    def pixel_control_loss(self) -> Tensor:
        """Q-learning of the pixel changes in every cell, over n steps."""
        windows, features = self._windows()
        q_values = self.heads["pixel_control"](features)
        q_values = q_values.view(*windows.indices.shape, *q_values.shape[1:])  # (W, n + 1, A, 21, 21)
        targets = losses.window_returns(
            self.pixel_rewards(windows),
            q_values.detach().amax(dim=2)[:, 1:],
            windows.steps,
            windows.terminated,
            self.config.tasks.pixel_gamma,
        )
        actions = self.replay.actions.view(-1)[windows.indices[:, :-1]].long()
        inside = windows.inside.float().view(-1)
        loss = losses.pixel_control_loss(
            q_values[:, :-1].flatten(0, 1), actions.view(-1), targets.flatten(0, 1), inside
        )
        return distributed.weighted(loss, inside)

    def value_replay_loss(self) -> Tensor:
        """Mean squared error of the score's value against the windows' returns, bootstrapped by today's network."""
        windows, features = self._windows()
        _, values, _ = self.policy.heads(features)
        values = values.view(windows.indices.shape)  # (W, n + 1)
        settings = self.config.agent
        rewards = losses.learned_rewards(
            self.replay.rewards.view(-1)[windows.indices[:, :-1]], settings.clip_rewards, settings.reward_scale
        )
        targets = losses.window_returns(
            rewards,
            values.detach()[:, 1:],
            windows.steps,
            windows.terminated,
            settings.gamma,
            settings.gae_lambda if self.config.tasks.returns == "gae" else 1.0,
        )
        inside = windows.inside.float().view(-1)
        loss = 2 * losses.value_loss(values[:, :-1].reshape(-1), targets.view(-1), inside)
        return distributed.weighted(loss, inside)

    def reward_prediction_loss(self) -> Tensor:
        """Cross-entropy of the next reward's sign; half of the observations come before a reward, half before none."""
        half = self.config.tasks.reward_batch // 2
        rewarded = self.replay.rewards != 0
        picks = [self.replay.sample_where(kind, half, self.generator) for kind in (rewarded, ~rewarded)]
        indices = torch.cat([rows for rows, _ in picks])
        # At first nothing may have been rewarded.
        there = torch.cat([found.expand(half) for _, found in picks]).float()
        logits = self.heads["reward_prediction"](self.policy.trunk(self.replay.stacks(indices)))
        labels = losses.reward_classes(self.replay.rewards.view(-1)[indices])
        loss = losses.masked_mean(F.cross_entropy(logits, labels, reduction="none"), there)
        return distributed.weighted(loss, there)
