"""Curiosity: Random Network Distillation (Burda 2018, arXiv 1810.12894).

A predictor learns to match a frozen random network. Where it fails, the frames are new: its error is the bonus.
`RND` is the paper's, for every agent; `NotebookRND` is the original notebook's, kept with its faults.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gravitar_dqn.config import RNDSettings
from gravitar_dqn.encoders import WIDTH, scale_pixels
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.losses import masked_mean
from gravitar_dqn.networks import IntrinsicNetwork, predictor_class
from gravitar_dqn.runtime import distributed

TRAINED_ENVS = 32  # of a rollout: more environments do not train the predictor faster


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, in float64 on the device (Chan's parallel update).

    Args:
        shape: of a value.
        shared: every rank brings values of its own; else all bring the same.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = (), *, shared: bool = False) -> None:
        super().__init__()
        self._total: Callable[..., tuple[Tensor, ...]] = distributed.total if shared else lambda *own: own
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
        # Within one batch float32 is exact enough, and several times faster on pictures.
        flat = values.view(len(values), -1)
        count, whole = self._total(keep.sum(), keep @ flat)
        mean = whole / count.clamp(min=1)
        (squares,) = self._total(keep @ (flat - mean).square())
        var = squares / count.clamp(min=1)
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
        """Advance by one step's rewards (num_envs,) where `mask` (num_envs,) is true; returns the sums (num_envs,)."""
        self.returns.copy_(torch.where(mask, self.gamma * self.returns + rewards, self.returns))
        return self.returns


class RND(nn.Module):
    """The two networks and their statistics.

    Both see the newest frame, normalized by the running mean and standard deviation of all frames. Bonuses are learned
    in units of the standard deviation of their own discounted sums along time. There is no bonus until the predictor
    has had `init_updates` gradient steps: before, its errors are tens of times larger everywhere, which tells nothing
    of novelty and would set that unit for long.

    Args:
        target: the frozen network.
        predictor: the one that learns; both map frames (N, *newest_shape) to features (N, D).
        spec: what the environments show.
        num_envs: environments that step together; on several ranks, this one's.
        gamma: discount of those sums.
        init_updates: gradient steps of the predictor before there is a bonus.
        trained_envs: the predictor learns from as many rows as so many environments bring, drawn anew at every
            gradient step; None: from all.
    """

    forward_filter: RewardForwardFilter
    updates: Tensor

    def __init__(
        self,
        target: nn.Module,
        predictor: nn.Module,
        spec: EnvSpec,
        num_envs: int,
        *,
        gamma: float,
        init_updates: int,
        trained_envs: int | None = None,
    ) -> None:
        super().__init__()
        self.target, self.predictor = target, predictor
        self.obs_rms = RunningMeanStd(spec.newest_shape, shared=True)
        self.reward_rms = RunningMeanStd()
        all_envs = num_envs * distributed.size()
        self.forward_filter = RewardForwardFilter(all_envs, gamma)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # gradient steps of the predictor
        self._spec, self._init_updates = spec, init_updates
        self._share = 1.0 if trained_envs is None else min(1.0, trained_envs / all_envs)

    @property
    def ready(self) -> Tensor:
        """Whether the predictor's errors tell new from known yet: bool scalar, on the device."""
        return self.updates >= self._init_updates

    def normalized(self, frames: Tensor) -> Tensor:
        """clip((frame - mean) / std, -5, 5) of frames (N, *newest_shape), 0..255; never divided by 255."""
        return normalize_frames(frames, self.obs_rms.mean, self.obs_rms.std)

    def errors(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared errors (N,) on frames as stored, and the target's features (N, D), which never change."""
        seen = self.normalized(frames)
        with torch.no_grad():
            features: Tensor = self.target(seen).float()
        return self._errors(seen, features), features

    def errors_against(self, frames: Tensor, features: Tensor) -> Tensor:
        """The same errors where the target's features are known."""
        return self._errors(self.normalized(frames), features)

    def _errors(self, seen: Tensor, features: Tensor) -> Tensor:
        errors: Tensor = (self.predictor(seen).float() - features).square().mean(dim=1)
        return errors

    def predictor_loss(self, errors: Tensor, generator: torch.Generator) -> Tensor:
        """Mean over a random share of the rows (N,) (Burda 2018, algorithm 1). Counts a gradient step."""
        self.updates += 1
        mask = (torch.rand(len(errors), device=errors.device, generator=generator) < self._share).float()
        return distributed.weighted(masked_mean(errors, mask), mask)

    def bonus(self, obs: Tensor) -> Tensor:
        """Errors (N,) of the newest frames of observations (N, *obs_shape)."""
        return self.errors(self._spec.newest(obs))[0]

    def _update_scale(self, bonuses: Tensor, counted: Tensor) -> None:
        """Take bonuses (T, B) in the order of time into the standard deviation, those where `counted` (T, B)."""
        # Every rank does this for the environments of all, so that a checkpoint of one has them all.
        bonuses, counted = distributed.gathered(bonuses), distributed.gathered(counted)
        steps = zip(bonuses, counted, strict=True)
        sums = [self.forward_filter.update(bonus, counts).clone() for bonus, counts in steps]
        self.reward_rms.update(torch.stack(sums).view(-1), counted.reshape(-1))

    # ---------------------------------------------------------------- for an agent that learns from single steps

    @torch.no_grad()
    def step_bonus(self, obs: Tensor, played: Tensor) -> Tensor:
        """Raw bonus (num_envs,) of the step that led to `obs`; statistics take in where `played` is true."""
        counted = played & self.ready
        bonus = self.bonus(obs) * counted
        self.obs_rms.update(self._spec.newest(obs), played)  # after the bonus, which used the old statistics
        self._update_scale(bonus[None], counted[None])
        return bonus

    def learning_rewards(self, bonus: Tensor) -> Tensor:
        """Stored bonuses, any shape, in today's units: divided by the intrinsic return's standard deviation."""
        return bonus / self.reward_rms.std

    def loss(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Predictor's loss, and the fresh bonus (B,) of the observations, which comes with it for free."""
        errors = self.bonus(obs)
        return self.predictor_loss(errors, generator), errors.detach() * self.ready

    # ---------------------------------------------------------------- for an agent that learns from rollouts

    @torch.no_grad()
    def rollout_rewards(self, bonuses: Tensor) -> Tensor:
        """Raw bonuses (T, B) of a rollout as they are learned; the unit takes them in first."""
        self._update_scale(bonuses, self.ready.expand(bonuses.shape))
        return bonuses * self.ready / self.reward_rms.std


def normalize_frames(frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """clip((frame - mean) / std, -5, 5) of frames (N, *newest_shape), 0..255."""
    return ((frames.float() - mean.float()) / std.float()).clamp(-5, 5)


class NotebookRND(nn.Module):
    """The original's bonus, faults included: see the table of its faults in agents/README.md.

    Only the target's input is divided by 255, the predictor never learns, and the bonus is normalized once, when it
    is stored, by mean and standard deviation of the last 1 000.
    """

    LENGTH = 1_000  # bonuses that the normalization looks back on

    history: Tensor
    seen: Tensor

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__()
        self._spec = spec
        shape = spec.obs_shape if spec.kind == "picture" else spec.newest_shape  # whole stacks of pictures
        self.target = IntrinsicNetwork(shape, predictor=False)
        self.predictor = IntrinsicNetwork(shape, predictor=True)
        # One place more, for the bonuses of steps that were not played: a fixed shape waits for no count.
        self.register_buffer("history", torch.zeros(self.LENGTH + 1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def step_bonus(self, obs: Tensor, played: Tensor) -> Tensor:
        """(bonus - mean) / std over the last 1 000 bonuses, these included, clipped to [-5, 5]: (num_envs,)."""
        with torch.no_grad():
            bonus = self.bonus(obs).double()
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

    def bonus(self, obs: Tensor) -> Tensor:
        """Half the sum of squared errors (B,) over the 512 features."""
        return 0.5 * self._squares(obs).sum(dim=1)

    def loss(self, obs: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        """Mean squared error over a random quarter of the rows, detached as in the original: nothing learns from it."""
        with torch.no_grad():
            errors = self._squares(obs).mean(dim=1)
        mask = torch.rand(len(errors), device=errors.device, generator=generator) < 0.25
        return masked_mean(errors, mask.float()), None

    def _squares(self, obs: Tensor) -> Tensor:
        obs = obs if self._spec.kind == "picture" else self._spec.newest(obs)
        features = self.predictor(obs.float()).float()  # 0..255
        squares: Tensor = (self.target(scale_pixels(obs)).float() - features).square()
        return squares


def make_rnd_networks(spec: EnvSpec, **arguments: int) -> tuple[nn.Module, nn.Module]:
    """The frozen network and the predictor of the presets, made with further `arguments`."""
    network = predictor_class(spec)
    return tuple(network(spec.newest_shape, trainable=trainable, **arguments) for trainable in (False, True))  # type: ignore[return-value]


def make_rnd(spec: EnvSpec, num_envs: int, settings: RNDSettings) -> RND | NotebookRND | None:
    """The curiosity of a DQN that `settings` ask for, for so many environments; None for a coefficient of 0."""
    if settings.coef == 0:
        return None
    if settings.variant == "notebook":
        return NotebookRND(spec)
    networks = make_rnd_networks(spec, dense_size=WIDTH)
    return RND(*networks, spec, num_envs, gamma=settings.gamma, init_updates=settings.init_updates)
