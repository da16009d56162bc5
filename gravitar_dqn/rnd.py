"""Curiosity: Random Network Distillation (Burda 2018, arXiv 1810.12894).

A predictor learns to match a frozen random network. Where it fails, the frames are new: its error is the bonus.
`RND` is the paper's; `NotebookRND` is the original notebook's, kept with its faults. Both offer the same three
calls: `observe` (bonus of a step, once, when it is played), `learning_rewards` (what of it is learned), `loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gravitar_dqn.config import RNDConfig
from gravitar_dqn.networks import IntrinsicNetwork, newest_of, newest_shape, scale_pixels
from gravitar_dqn.returns import masked_mean


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, in float64 on the device (Chan's parallel update)."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in `values` (N, *shape), only those where `mask` (N,) is true if one is given."""
        with torch.autocast(values.device.type, enabled=False):  # it would do the sums in bfloat16
            self._update(values, mask)

    def _update(self, values: Tensor, mask: Tensor | None) -> None:
        values = values.float()
        keep = torch.ones(len(values), device=values.device) if mask is None else mask.float()
        count = keep.sum()
        # Within one batch float32 is exact enough, and several times faster on pictures.
        flat = values.view(len(values), -1)
        mean = (keep @ flat) / count.clamp(min=1)
        var = (keep @ (flat - mean).square()) / count.clamp(min=1)
        mean, var, count = mean.view(self.mean.shape).double(), var.view(self.var.shape).double(), count.double()
        total, delta = self.count + count, mean - self.mean
        m2 = self.var * self.count + var * count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        """Standard deviation, float32; never zero."""
        return (self.var + 1e-8).sqrt().float()


class RewardForwardFilter(nn.Module):
    """Discounted sums R_t = gamma * R_(t-1) + r_t, one for each environment, along time."""

    returns: Tensor

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("returns", torch.zeros(num_envs))

    def update(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Advance by one step's rewards (num_envs,) where `mask` (num_envs,) is true; gives the sums (num_envs,)."""
        self.returns.copy_(torch.where(mask, self.gamma * self.returns + rewards, self.returns))
        return self.returns


class RND(nn.Module):
    """Bonus of the newest frame, on observations normalized by their running mean and standard deviation.

    The bonus is divided by the running standard deviation of its own discounted sums. Both networks see the
    same normalized frame. There is no bonus until the predictor has had `init_updates` gradient steps: before, its
    errors are tens of times larger everywhere, which tells nothing of novelty and would set the scale for long.
    """

    updates: Tensor

    def __init__(self, obs_shape: tuple[int, ...], num_envs: int, config: RNDConfig) -> None:
        super().__init__()
        frame_shape = newest_shape(obs_shape)
        self.config = config
        self.target = IntrinsicNetwork(frame_shape, predictor=False)
        self.predictor = IntrinsicNetwork(frame_shape, predictor=True)
        self.obs_rms = RunningMeanStd(frame_shape)
        self.reward_rms = RunningMeanStd()
        self.forward_filter = RewardForwardFilter(num_envs, config.gamma)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # gradient steps of the predictor

    def observe(self, obs: Tensor, played: Tensor) -> Tensor:
        """Raw bonus (num_envs,) of the step that led to `obs`; statistics take in where `played` is true."""
        with torch.no_grad():
            ready = played & self.ready
            bonus = self.errors(obs) * ready
        self.obs_rms.update(newest_of(obs).float(), played)  # after the bonus, which used the old statistics
        self.reward_rms.update(self.forward_filter.update(bonus, ready), ready)
        return bonus

    @property
    def ready(self) -> Tensor:
        """Whether the predictor's errors tell new from known yet: bool scalar, on the device."""
        return self.updates >= self.config.init_updates

    def learning_rewards(self, bonus: Tensor) -> Tensor:
        """Stored bonuses, any shape, in today's units: divided by the intrinsic return's standard deviation."""
        return bonus / self.reward_rms.std

    def errors(self, obs: Tensor) -> Tensor:
        """Mean squared error (B,) over the 512 features, with the predictor's gradient."""
        z = (newest_of(obs).float() - self.obs_rms.mean.float()) / self.obs_rms.std
        z = z.clamp(-5, 5)
        with torch.no_grad():
            target = self.target(z).float()
        errors: Tensor = (self.predictor(z).float() - target).square().mean(dim=1)
        return errors

    def loss(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Predictor's loss, and the fresh bonus (B,) of the observations, which comes with it for free."""
        errors = self.errors(obs)
        self.updates += 1
        return errors.mean(), errors.detach() * self.ready


class NotebookRND(nn.Module):
    """The original's bonus, faults included: see the table of its faults in gravitar_dqn/README.md.

    Only the target's input is divided by 255, the predictor never learns, and the bonus is normalized once, when it
    is stored, by mean and standard deviation of the last 1 000.
    """

    LENGTH = 1_000  # bonuses that the normalization looks back on

    history: Tensor
    seen: Tensor

    def __init__(self, obs_shape: tuple[int, ...], num_envs: int, config: RNDConfig) -> None:
        super().__init__()
        self.config = config
        shape = obs_shape if len(obs_shape) == 3 else newest_shape(obs_shape)  # whole stacks of pictures
        self.target = IntrinsicNetwork(shape, predictor=False)
        self.predictor = IntrinsicNetwork(shape, predictor=True)
        # One place more, for the bonuses of steps that were not played: a fixed shape waits for no count.
        self.register_buffer("history", torch.zeros(self.LENGTH + 1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def observe(self, obs: Tensor, played: Tensor) -> Tensor:
        """(bonus - mean) / std over the last 1 000 bonuses, these included, clipped to [-5, 5]: (num_envs,)."""
        with torch.no_grad():
            bonus = self.errors(obs).double()
        place = (self.seen + played.cumsum(0) - 1) % self.LENGTH
        self.history[torch.where(played, place, self.LENGTH)] = bonus
        self.seen += played.sum()
        recent, valid = self.history[:-1], torch.arange(self.LENGTH, device=bonus.device) < self.seen
        mean = masked_mean(recent, valid.double())
        std = masked_mean((recent - mean) ** 2, valid.double()).sqrt()
        return ((bonus - mean) / std.clamp(min=1e-8)).clamp(-5, 5).float()

    def learning_rewards(self, bonus: Tensor) -> Tensor:
        """What was stored, as it was: it goes stale."""
        return bonus

    def errors(self, obs: Tensor) -> Tensor:
        """Half the sum of squared errors (B,) over the 512 features."""
        return 0.5 * self._squares(obs).sum(dim=1)

    def loss(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        """Mean squared error over a random quarter of the rows, detached as in the original: nothing learns from it."""
        with torch.no_grad():
            errors = self._squares(obs).mean(dim=1)
        mask = torch.rand(len(errors), device=errors.device, generator=generator) < 0.25
        return masked_mean(errors, mask.float()), None

    def _squares(self, obs: Tensor) -> Tensor:
        obs = obs if obs.dim() == 4 else newest_of(obs)
        features = self.predictor(obs.float()).float()  # 0..255
        squares: Tensor = (self.target(scale_pixels(obs)).float() - features).square()
        return squares


def make_rnd(obs_shape: tuple[int, ...], num_envs: int, config: RNDConfig) -> RND | NotebookRND | None:
    """The curiosity that `config` asks for; None for a coefficient of 0."""
    if config.coef == 0:
        return None
    return (RND if config.variant == "rnd" else NotebookRND)(obs_shape, num_envs, config)
