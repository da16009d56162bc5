"""PPO with curiosity and tasks a second time, plainly and slowly, as an oracle for the agent.

`Plain` knows only the settings, the weights at the start, the seed, and what a script of games fed in; it keeps that in
lists and computes with loops and formulas by hand. From torch it takes the networks' forward, autograd, and the random
numbers, which it draws in the agent's order. After every gradient step it takes over the agent's weights, once they
were found right, so that rounding cannot add up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from ppo_helpers import PPO_RND, VECTOR_TASKS, settings
from torch import Tensor, nn

from gravitar_dqn.agents.auxiliary_tasks import TASKS, make_task_heads, task_weights
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.agents.rollout import Networks
from gravitar_dqn.config import PPORNDSettings, PPORunConfig, TaskSettings
from gravitar_dqn.encoders import NatureCNN
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.rnd import make_rnd_networks

Array = np.ndarray[Any, Any]
CPU = torch.device("cpu")
VECTOR = EnvSpec((3,), torch.float32, num_actions=3)
PICTURE = EnvSpec((84, 84), torch.uint8, num_actions=3)
NARROW = 16  # features of the picture networks: made and run quickly

# The same examples at every run, and no search for a smaller one: an example takes a second, and names its settings.
few = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


# ---------------------------------------------------------------- what both are fed with


class Script:
    """Games drawn from a seed: deaths, time-outs, both at once, and a dummy step after each.

    On the dummy step rewards and ends are nonsense: they must count nowhere.

    Args:
        spec: what a frame is.
        num_envs: games side by side.
        seed: of all that happens.
        rewarded: probability of a reward other than 0.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int = 0, rewarded: float = 0.4) -> None:
        self._spec, self._num_envs, self._rewarded = spec, num_envs, rewarded
        self._random = np.random.default_rng(seed)
        self._played = np.ones(num_envs, dtype=bool)

    def frames(self) -> Array:
        """The next frames; the darkest and the brightest pixel change from picture to picture."""
        shape = (self._num_envs, *self._spec.frame_shape)
        if self._spec.kind == "vector":
            return self._random.normal(size=shape).astype(np.float32)
        low, high = self._random.integers(0, 100), self._random.integers(120, 250)
        return self._random.integers(low, high, shape).astype(np.uint8)

    def begin(self) -> Array:
        """The first frames of new games everywhere."""
        self._played[:] = True
        return self.frames()

    def step(self) -> tuple[Array, Array, Array, Array, Array]:
        """Rewards, terminations, truncations, the next frames, and where an action was played."""
        size, random = self._num_envs, self._random
        rewards = np.where(random.random(size) < self._rewarded, random.choice([0.5, 3.0, -0.4, -5.0], size), 0.0)
        terminations, truncations = random.random(size) < 0.2, random.random(size) < 0.2
        played = self._played
        self._played = ~((terminations | truncations) & played)
        return np.where(played, rewards, 7.0), terminations, truncations, self.frames(), played


def make_agent(config: PPORunConfig, spec: EnvSpec, seed: int = 0) -> PPOAgent:
    """An agent with weights as they are later: no policy is uniform and no bias 0."""
    torch.manual_seed(seed)
    networks = None
    if spec.kind == "picture":
        policy = ActorCritic(NatureCNN, spec.obs_shape, spec.num_actions, dense_size=NARROW)
        heads = make_task_heads(task_weights(config.tasks), spec, NARROW)
        rnd = make_rnd_networks(spec, dense_size=NARROW) if config.rnd.coef else None
        networks = Networks(policy, heads, rnd)
    agent = PPOAgent(config, spec, CPU, networks)
    logits = agent.policy.policy[0]
    assert isinstance(logits, nn.Linear)
    with torch.no_grad():
        logits.weight *= 50
        for module in (agent.learners, agent.rnd.predictor if agent.rnd is not None else nn.Module()):
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.normal_(std=0.1)
    return agent


# ---------------------------------------------------------------- formulas by hand


def plain_mean(values: Sequence[Tensor]) -> Tensor:
    """0 where there is none."""
    return torch.stack(list(values)).mean() if values else torch.zeros(())


def plain_gae(
    rewards: list[float], values: list[float], gamma: float, lambda_: float, terminated: list[bool], done: list[bool]
) -> list[float]:
    """A_t = sum_k (gamma lambda)^k delta_(t+k), up to the game's end, of one environment."""
    steps = len(rewards)
    deltas = [rewards[t] + gamma * (0.0 if terminated[t] else values[t + 1]) - values[t] for t in range(steps)]
    advantages = []
    for t in range(steps):
        total, weight = 0.0, 1.0
        for k in range(t, steps):
            total += weight * deltas[k]
            weight *= gamma * lambda_
            if done[k]:
                break
        advantages.append(total)
    return advantages


def plain_window_returns(
    rewards: list[Any], next_values: list[Any], terminated: bool, gamma: float, lambda_: float
) -> list[Any]:
    """R_k = r_k + gamma ((1 - lambda) V_(k+1) + lambda R_(k+1)) of one window, which bootstraps unless it ends dead."""
    ahead = 0.0 if terminated else next_values[-1]
    returns: list[Any] = []
    for k in reversed(range(len(rewards))):
        returns.insert(0, rewards[k] + gamma * ahead)
        ahead = (1 - lambda_) * next_values[k - 1] + lambda_ * returns[0]
    return returns


def plain_explained_variance(values: list[float], returns: list[float]) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    if not values:
        return 1.0
    return 1 - float(np.var(np.subtract(returns, values))) / max(float(np.var(returns)), 1e-8)


def plain_gradients(loss: Tensor, parameters: list[nn.Parameter], max_norm: float) -> list[Array]:
    """The loss's gradient, clipped to a norm; 0: never."""
    found: Iterable[Tensor | None] = [None] * len(parameters)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [
        np.zeros(parameter.shape) if gradient is None else gradient.double().numpy()
        for parameter, gradient in zip(parameters, found, strict=True)
    ]
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    return [scale * gradient for gradient in gradients]


@dataclass
class PlainOptimizer:
    """Adam (Kingma 2015, algorithm 1) or RMSprop."""

    kind: str
    steps: int = 0
    first: list[Any] = field(default_factory=list)  # mean of gradients
    second: list[Any] = field(default_factory=list)  # mean of squared gradients

    def changes(self, gradients: list[Array], rate: float) -> list[Array]:
        """What a step adds to the weights."""
        if not self.steps:
            self.first, self.second = [0.0] * len(gradients), [0.0] * len(gradients)
        self.steps += 1
        if self.kind == "rmsprop":
            self.second = [0.99 * v + 0.01 * g**2 for v, g in zip(self.second, gradients, strict=True)]
            return [-rate * g / (np.sqrt(v) + 1e-5) for v, g in zip(self.second, gradients, strict=True)]
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, gradients, strict=True)]
        self.second = [0.999 * v + 0.001 * g**2 for v, g in zip(self.second, gradients, strict=True)]
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        return [
            -rate * (m / first) / (np.sqrt(v / second) + 1e-8) for m, v in zip(self.first, self.second, strict=True)
        ]


@dataclass
class PlainStatistics:
    """Mean and variance of all that was seen, and of a ten-thousandth of a value with mean 0 and variance 1."""

    PRIOR = 1e-4
    values: list[Any] = field(default_factory=list)

    @property
    def count(self) -> float:
        return len(self.values) + self.PRIOR

    @property
    def mean(self) -> Any:
        return sum(self.values) / self.count

    @property
    def var(self) -> Any:
        mean = self.mean
        return (sum((value - mean) ** 2 for value in self.values) + self.PRIOR * (1 + mean**2)) / self.count

    @property
    def std(self) -> Any:
        return np.sqrt(self.var + 1e-8)


# ---------------------------------------------------------------- the oracle


@dataclass
class Row:
    """What was seen at one time in every environment and, once it was played, what was done and what came of it."""

    frames: Array  # (B, *frame_shape)
    starts: list[int]  # when each game's first frame was seen
    actions: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    values_ext: list[float] = field(default_factory=list)
    values_int: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    played: list[bool] = field(default_factory=list)


Place = tuple[int, int]  # a time and an environment


class Plain:
    """The agent, written a second time; `check_...` compare the other one with it."""

    def __init__(self, agent: PPOAgent, config: PPORunConfig, spec: EnvSpec) -> None:
        self.config, self.spec, self.num_envs = config, spec, config.env.num_envs
        self.weights = {"pixel_control": config.tasks.pixel_control}
        self.weights["reward_prediction"] = config.tasks.reward_prediction
        self.weights["value_replay"] = config.tasks.value_replay
        self.tasks = [name for name in TASKS if self.weights[name] > 0]
        self.curious = config.rnd.coef != 0
        self.window = config.tasks.window if self.tasks else 1
        self.policy, self.heads = copy.deepcopy(agent.policy), copy.deepcopy(agent.tasks.heads)
        self.learners = [*self.policy.parameters(), *self.heads.parameters()]
        self.optimizer = PlainOptimizer(config.agent.optimizer)
        if self.curious:
            assert agent.rnd is not None
            self.target, self.predictor = copy.deepcopy(agent.rnd.target), copy.deepcopy(agent.rnd.predictor)
            self.predictor_optimizer = PlainOptimizer(config.agent.optimizer)
        self.obs_statistics, self.return_statistics = PlainStatistics(), PlainStatistics()
        self.filtered = [0.0] * self.num_envs  # discounted sums of bonuses
        self.predictor_steps = 0
        self.pixels: tuple[float, float] | None = None  # darkest and brightest seen
        self.random = torch.Generator().manual_seed(config.seed)
        self.history: list[Row] = []
        self.random_left = config.rnd.init_steps if self.curious else 0
        self.in_rollout = self.played = self.games = self.gradient_steps = 0
        self.rate = config.agent.learning_rate
        self.minibatches: list[list[Place]] = []  # still to come
        self.metrics: dict[str, list[float]] = {}

    # ------------------------------------------------------------ playing

    @property
    def now(self) -> int:
        """The time of the newest frames."""
        return len(self.history) - 1

    def begin(self, frames: Array) -> None:
        """New games everywhere; those under way are cut off at their last frame, whose row plays nothing."""
        if self.history:
            last, never = self.history[-1], [False] * self.num_envs
            last.actions, last.rewards = [0] * self.num_envs, [0.0] * self.num_envs
            last.terminated, last.truncated, last.played = never, never, never
            before = self.history[-2]
            pairs = zip(before.played, before.terminated, before.truncated, strict=True)
            before.truncated = [cut or (played and not dead) for played, dead, cut in pairs]
        self.history.append(Row(frames, [self.now + 1] * self.num_envs))
        self.in_rollout = 0

    def observation(self, time: int, env: int) -> Array:
        """The newest frames of a game, oldest first; before its start there is nothing, or its first frame again."""
        frame: Array = self.history[time].frames[env]
        if self.spec.kind == "vector":
            return frame
        start = self.history[time].starts[env]
        stack = []
        for t in range(time - 3, time + 1):
            frame = self.history[max(t, start)].frames[env]
            stack.append(frame if t >= start or self.config.env.obs_type == "ram" else np.zeros_like(frame))
        return np.stack(stack)

    def observations(self, places: Iterable[Place]) -> Tensor:
        return torch.from_numpy(np.stack([self.observation(time, env) for time, env in places]))

    def everywhere(self, *times: int) -> list[Place]:
        """Every environment at these times."""
        return [(time, env) for time in times for env in range(self.num_envs)]

    @torch.no_grad()
    def act(self) -> list[int]:
        """Random actions at the start, then the policy's; notes what it thought when it chose."""
        row, size = self.history[-1], (self.num_envs, self.spec.num_actions)
        if self.random_left:
            actions = torch.zeros(self.num_envs, dtype=torch.int64).random_(size[1], generator=self.random)
            row.actions = actions.tolist()
            return row.actions
        logits, values_ext, values_int = self.policy(self.observations(self.everywhere(self.now)))
        noise = torch.zeros(size).exponential_(generator=self.random)
        row.actions = [int(np.argmax(scores)) for scores in (logits - noise.log()).numpy()]
        row.log_probs = [
            float(each[action] - np.log(np.exp(each).sum()))
            for each, action in zip(logits.double().numpy(), row.actions, strict=True)
        ]
        row.values_ext, row.values_int = values_ext.tolist(), values_int.tolist()
        return row.actions

    def observe(self, rewards: Array, terminations: Array, truncations: Array, frames: Array, played: Array) -> None:
        """Note what the actions led to."""
        row, time = self.history[-1], self.now
        row.rewards, row.played = rewards.tolist(), played.tolist()
        row.terminated, row.truncated = (terminations & played).tolist(), (truncations & played).tolist()
        starts = [start if real else time + 1 for start, real in zip(row.starts, row.played, strict=True)]
        self.history.append(Row(frames, starts))
        self.played += sum(row.played)
        self.games += sum(dead or cut for dead, cut in zip(row.terminated, row.truncated, strict=True))
        if self.random_left:
            self.random_left -= 1
            self.update_statistics([self.now])
        elif time >= self.window:  # the first window was complete
            self.in_rollout += 1

    def update_statistics(self, times: Iterable[int]) -> None:
        """Take in the frames seen at these times."""
        for time, env in self.everywhere(*times):
            frame = self.history[time].frames[env]
            if self.curious:
                self.obs_statistics.values.append(frame.astype(np.float64))
            if "pixel_control" in self.tasks:
                low, high = self.pixels or (255.0, 0.0)
                self.pixels = min(low, float(frame.min())), max(high, float(frame.max()))

    # ------------------------------------------------------------ returns and advantages

    @property
    def rollout(self) -> range:
        """The times of its actions."""
        return range(self.now - self.config.agent.num_steps, self.now)

    def learned(self, reward: float) -> float:
        """A reward as it is learned."""
        settings = self.config.agent
        return settings.reward_scale * (min(1.0, max(-1.0, reward)) if settings.clip_rewards else reward)

    def errors(self, places: Iterable[Place]) -> Tensor:
        """The predictor's mean squared errors on the frames at these places."""
        mean, std = (np.float32(value) for value in (self.obs_statistics.mean, self.obs_statistics.std))
        frames = np.stack([(self.history[time].frames[env] - mean) / std for time, env in places])
        seen = torch.from_numpy(frames.clip(-5, 5).astype(np.float32)).view(-1, *self.spec.newest_shape)
        errors: Tensor = (self.predictor(seen) - self.target(seen)).square().mean(dim=1)
        return errors

    @torch.no_grad()
    def compute_advantages(self) -> None:
        """Returns and advantages of a full rollout, by time and environment, and the learning rate of now."""
        settings, rollout = self.config.agent, self.rollout
        share = min(1.0, self.played / settings.learning_rate_decay) if settings.learning_rate_decay else 0.0
        self.rate = (1 - share) * settings.learning_rate + share * settings.learning_rate_end
        last = self.policy(self.observations(self.everywhere(self.now)))
        self.advantages, self.returns_ext, self.returns_int = {}, {}, {}
        bonuses = self.bonuses() if self.curious else {}
        no = [False] * len(rollout)
        for env in range(self.num_envs):
            rows = [self.history[time] for time in rollout]
            dead = [row.terminated[env] for row in rows]
            done = [row.terminated[env] or row.truncated[env] for row in rows]
            rewards = [self.learned(row.rewards[env]) for row in rows]
            values = [*(row.values_ext[env] for row in rows), float(last[1][env])]
            ext = plain_gae(rewards, values, settings.gamma, settings.gae_lambda, dead, done)
            for time, value, advantage in zip(rollout, values, ext, strict=False):
                self.returns_ext[time, env] = value + advantage
                self.advantages[time, env] = settings.ext_coef * advantage
            if self.curious:
                rewards = [self.config.rnd.coef * bonuses[time, env] for time in rollout]
                values = [*(row.values_int[env] for row in rows), float(last[2][env])]
                ints = plain_gae(rewards, values, self.config.rnd.gamma, settings.gae_lambda, no, no)
                for time, value, advantage in zip(rollout, values, ints, strict=False):
                    self.returns_int[time, env] = value + advantage
                    self.advantages[time, env] += advantage
        self.real = [(time, env) for time, env in self.everywhere(*rollout) if self.history[time].played[env]]
        if settings.normalize_advantages:
            found = [self.advantages[place] for place in self.real]
            mean, std = np.mean(found), np.std(found)
            self.advantages = {place: float((value - mean) / (std + 1e-8)) for place, value in self.advantages.items()}
        self.note_rollout(bonuses)
        self.in_rollout = 0

    def bonuses(self) -> dict[Place, float]:
        """Errors on the frames that the actions led to, in units of their discounted sums' standard deviation."""
        after = self.everywhere(*(time + 1 for time in self.rollout))
        raw = dict(zip(self.everywhere(*self.rollout), self.errors(after).tolist(), strict=True))
        if self.predictor_steps < self.config.rnd.init_updates:
            return dict.fromkeys(raw, 0.0)
        for time in self.rollout:
            for env in range(self.num_envs):
                self.filtered[env] = self.config.rnd.gamma * self.filtered[env] + raw[time, env]
            self.return_statistics.values += self.filtered
        unit = self.return_statistics.std
        return {place: error / unit for place, error in raw.items()}

    def note(self, name: str, value: Any) -> None:
        self.metrics.setdefault(name, []).append(value.item() if isinstance(value, Tensor) else float(value))

    def note_rollout(self, bonuses: dict[Place, float]) -> None:
        """What is charted of a rollout."""

        def explained(places: list[Place], returns: dict[Place, float], name: str) -> float:
            values = [getattr(self.history[time], name)[env] for time, env in places]
            return plain_explained_variance(values, [returns[place] for place in places])

        self.note("explained_variance_ext", explained(self.real, self.returns_ext, "values_ext"))
        if self.curious:
            self.note("int_reward_mean", np.mean([*bonuses.values()]))
            self.note("int_reward_max", max(bonuses.values()))
            self.note("int_return_mean", np.mean([*self.returns_int.values()]))
            self.note("explained_variance_int", explained([*bonuses], self.returns_int, "values_int"))

    # ------------------------------------------------------------ losses

    def policy_loss(self, places: list[Place]) -> Tensor:
        """PPO's loss with both values', of a minibatch. A row that was not played has a value of the bonus alone."""
        settings = self.config.agent
        logits, values_ext, values_int = self.policy(self.observations(places))
        terms: dict[str, list[Tensor]] = {name: [] for name in "policy ext int entropy kl clipped".split()}
        for k, (time, env) in enumerate(places):
            row = self.history[time]
            if self.curious:
                terms["int"].append(0.5 * (values_int[k] - self.returns_int[time, env]) ** 2)
            if not row.played[env]:
                continue
            log_probs = logits[k] - logits[k].exp().sum().log()
            ratio = (log_probs[row.actions[env]] - row.log_probs[env]).exp()
            advantage = self.advantages[time, env]
            low, high = 1 - settings.clip_coef, 1 + settings.clip_coef
            clipped = ratio.clamp(low, high)
            terms["policy"].append(-torch.minimum(ratio * advantage, clipped * advantage))
            terms["ext"].append(0.5 * (values_ext[k] - self.returns_ext[time, env]) ** 2)
            terms["entropy"].append(-(log_probs.exp() * log_probs).sum())
            terms["kl"].append(ratio - 1 - ratio.log())
            terms["clipped"].append(((ratio < low) | (ratio > high)).float())
        means = {name: plain_mean(values) for name, values in terms.items()}
        names = {"policy": "policy_loss", "ext": "value_loss_ext", "entropy": "entropy"}
        names |= {"kl": "approx_kl", "clipped": "clip_fraction"} | ({"int": "value_loss_int"} if self.curious else {})
        for short, name in names.items():
            self.note(name, means[short])
        return means["policy"] - settings.ent_coef * means["entropy"] + means["ext"] + means["int"]

    def predictor_loss(self, places: list[Place]) -> Tensor:
        """Of the frames that the actions led to, over rows drawn as 32 environments' share of all."""
        errors = self.errors([(time + 1, env) for time, env in places])
        draws = torch.rand(len(places), generator=self.random).tolist()
        self.predictor_steps += 1
        taken = [error for error, draw in zip(errors, draws, strict=True) if draw < 32 / self.num_envs]
        loss = plain_mean(taken)
        self.note("rnd_loss", loss)
        return loss

    def sampleable(self) -> list[Place]:
        """Where a window may start, in the ring's order: at the newest steps that have a whole window, if played."""
        steps = max(self.config.tasks.replay_length, self.config.agent.num_steps)
        ring = steps + self.window + self.spec.stack - 1  # rows
        newest = self.now - self.window
        times = sorted(range(max(0, newest - steps + 1), newest + 1), key=lambda time: time % ring)
        return [(time, env) for time, env in self.everywhere(*times) if self.history[time].played[env]]

    def windows(self) -> list[list[Place]]:
        """Places of each sampled window's frames, the last of which is after its last step."""
        draws = torch.rand(2, self.config.tasks.num_windows, dtype=torch.float64, generator=self.random).tolist()
        places, windows = self.sampleable(), []
        for first, second in zip(*draws, strict=True):
            time = places[int(first * len(places))][0]
            envs = [env for t, env in places if t == time]
            env = envs[int(second * len(envs))]
            window = [(time, env)]
            for t in range(time, time + self.window):
                window.append((t + 1, env))
                if self.history[t].terminated[env] or self.history[t].truncated[env]:
                    break
            windows.append(window)
        return windows

    def ends_dead(self, window: list[Place]) -> bool:
        """Whether the window's last step killed."""
        time, env = window[-2]
        return self.history[time].terminated[env]

    def change(self, place: Place) -> Array:
        """What the step changed in the picture, (21, 21): the mean of 4x4 pixels."""
        low, high = (self.pixels or (0.0, 255.0)) if self.config.tasks.scale_pixels else (0.0, 255.0)
        (time, env), width = place, max(high - low, 1.0)
        before, after = (self.history[t].frames[env].astype(np.float64) for t in (time, time + 1))
        cells: Array = np.abs((after - before) / width).reshape(21, 4, 21, 4).mean(axis=(1, 3))
        return cells

    def pixel_control(self) -> Tensor:
        """Half the squared error of the chosen actions' cells."""
        terms = []
        for window in self.windows():
            q_values = self.heads["pixel_control"](self.policy.trunk(self.observations(window)))
            best = q_values.detach().double().numpy().max(axis=1)
            changes = [self.change(place) for place in window[:-1]]
            gamma = self.config.tasks.pixel_gamma
            returns = plain_window_returns(changes, [*best[1:]], self.ends_dead(window), gamma, 1.0)
            for k, (time, env) in enumerate(window[:-1]):
                chosen = q_values[k, self.history[time].actions[env]]
                terms.append(0.5 * (chosen - torch.from_numpy(returns[k]).float()).square().mean())
        return plain_mean(terms)

    def reward_prediction(self) -> Tensor:
        """Cross-entropy of none, positive, negative; half of the batch is rewarded."""
        half, places = self.config.tasks.reward_batch // 2, self.sampleable()
        picked: list[Place] = []
        for kind in (True, False):
            draws = torch.rand(half, dtype=torch.float64, generator=self.random).tolist()
            found = [(time, env) for time, env in places if (self.history[time].rewards[env] != 0) == kind]
            picked += [found[int(draw * len(found))] for draw in draws if found]
        all_logits = self.heads["reward_prediction"](self.policy.trunk(self.observations(picked)))
        terms = []
        for (time, env), logits in zip(picked, all_logits, strict=True):
            reward = self.history[time].rewards[env]
            label = 0 if reward == 0 else 1 if reward > 0 else 2
            terms.append(logits.exp().sum().log() - logits[label])
        return plain_mean(terms)

    def value_replay(self) -> Tensor:
        """Squared error of the score's value."""
        settings, terms = self.config.agent, []
        lambda_ = settings.gae_lambda if self.config.tasks.returns == "gae" else 1.0
        for window in self.windows():
            _, values, _ = self.policy(self.observations(window))
            rewards = [self.learned(self.history[time].rewards[env]) for time, env in window[:-1]]
            after = values.detach().tolist()[1:]
            returns = plain_window_returns(rewards, after, self.ends_dead(window), settings.gamma, lambda_)
            terms += [(value - target) ** 2 for value, target in zip(values, returns, strict=False)]
        return plain_mean(terms)

    # ------------------------------------------------------------ comparing

    def check_playing(self, agent: PPOAgent) -> None:
        """Clocks and statistics, at every moment between two steps."""
        assert agent.epsilon == float(self.random_left > 0)
        assert (agent.global_step, agent.episodes, agent.num_updates) == (self.played, self.games, self.gradient_steps)
        assert torch.equal(agent.generator.get_state(), self.random.get_state())
        assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(self.rate)
        if "pixel_control" in self.tasks:
            assert tuple(agent.tasks.pixel_range.tolist()) == (self.pixels or (255.0, 0.0))
        assert (agent.rnd is not None) == self.curious
        if agent.rnd is None:
            return
        pairs = ((agent.rnd.obs_rms, self.obs_statistics), (agent.rnd.reward_rms, self.return_statistics))
        for statistics, plain in pairs:
            assert statistics.count.item() == pytest.approx(plain.count)
            if plain.values:
                close(statistics.mean.reshape(np.shape(plain.mean)), plain.mean, 1e-4)
                close(statistics.var.reshape(np.shape(plain.var)), plain.var, 1e-4)
        close(agent.rnd.forward_filter.returns, self.filtered, 1e-4)
        assert agent.rnd.updates.item() == self.predictor_steps

    def check_action(self, agent: PPOAgent, actions: Tensor) -> None:
        """The agent's actions, and what it keeps of that moment."""
        assert actions.tolist() == self.act()
        if not self.random_left:
            row, step = self.history[-1], self.in_rollout
            close(agent.rollout.log_probs[step], row.log_probs)
            close(agent.rollout.values_ext[step], row.values_ext)
            close(agent.rollout.values_int[step], row.values_int)

    def check_advantages(self, agent: PPOAgent) -> None:
        """What a rollout is learned with."""
        assert not self.minibatches, "a gradient step of the rollout before is missing"
        self.compute_advantages()
        rollout, places, real = agent.rollout, self.everywhere(*self.rollout), set(self.real)
        assert rollout.valid.tolist() == [float(place in real) for place in places]
        close(rollout.log_probs, [self.history[time].log_probs for time in self.rollout])
        pairs = [(rollout.advantages, self.advantages), (rollout.returns_ext, self.returns_ext)]
        for found, plain in pairs:  # a row that was not played counts nowhere
            values = [float(value) for value, place in zip(found, places, strict=True) if place in real]
            close(torch.tensor(values), [plain[place] for place in self.real], 1e-3)
        if self.curious:
            close(rollout.returns_int, [self.returns_int[place] for place in places], 1e-3)

    def check_gradient_step(self, agent: PPOAgent) -> None:
        """The gradients of one minibatch and the weights after it."""
        settings = self.config.agent
        if not self.minibatches:
            order = torch.randperm(settings.num_steps * self.num_envs, generator=self.random).tolist()
            places, size = self.everywhere(*self.rollout), len(order) // settings.num_minibatches
            self.minibatches = [
                [places[row] for row in order[i : i + size]] for i in range(0, settings.num_minibatches * size, size)
            ]
        places = self.minibatches.pop(0)
        total = plain_gradients(self.policy_loss(places), self.learners, settings.max_grad_norm)
        for name in self.tasks:
            loss: Tensor = getattr(self, name)()
            self.note(f"{name}_loss", loss)
            each = plain_gradients(loss, self.learners, settings.max_grad_norm)
            total = [sum_ + self.weights[name] * part for sum_, part in zip(total, each, strict=True)]
        theirs = [*agent.policy.parameters(), *agent.tasks.heads.parameters()]
        self.check_weights(theirs, self.learners, total, self.optimizer)
        if self.curious:
            parameters = [*self.predictor.parameters()]
            gradients = plain_gradients(self.predictor_loss(places), parameters, settings.max_grad_norm)
            assert agent.rnd is not None
            self.check_weights([*agent.rnd.predictor.parameters()], parameters, gradients, self.predictor_optimizer)
        self.gradient_steps += 1

    def check_weights(
        self, theirs: list[nn.Parameter], ours: list[nn.Parameter], gradients: list[Array], optimizer: PlainOptimizer
    ) -> None:
        """The agent's gradients, and its weights after the step that they make; then take those over."""
        found = [np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for p in theirs]
        largest = max(float(np.abs(gradient).max()) for gradient in gradients)
        for gradient, expected in zip(found, gradients, strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=3e-5 * largest + 1e-9)
        for their, our, change in zip(theirs, ours, optimizer.changes(found, self.rate), strict=True):
            moved = (their.detach().double() - our.detach().double()).numpy()
            np.testing.assert_allclose(moved, change, rtol=1e-3, atol=1e-3 * self.rate + 2e-7)
            our.data.copy_(their.data)

    def check_metrics(self, agent: PPOAgent) -> None:
        """The means of what an update made known."""
        told = agent.metrics()
        ring = self.window + self.spec.stack - 1 + self.config.agent.num_steps
        if self.tasks:
            ring += max(0, self.config.tasks.replay_length - self.config.agent.num_steps)
        expected = {name: float(np.mean(values)) for name, values in self.metrics.items()}
        expected |= {"learning_rate": self.rate, "buffer_fill": min(1.0, len(self.history) / ring)}
        assert told == pytest.approx(expected, rel=2e-3, abs=1e-5)
        self.metrics.clear()


def close(found: Tensor, expected: Any, rtol: float = 1e-4) -> None:
    """Assert equality but for rounding."""
    np.testing.assert_allclose(found.detach().double().numpy(), np.asarray(expected), rtol=rtol, atol=1e-5)


def then(first: Callable[[], None], second: Callable[[PPOAgent], None], agent: PPOAgent) -> Callable[[], None]:
    """A function that does the one, and then the other on the agent."""

    def both() -> None:
        first()
        second(agent)

    return both


def check_run(config: PPORunConfig, spec: EnvSpec, script: Script, steps: int, restart: int = -1) -> Plain:
    """Play so many steps with agent and oracle and compare them all along; at step `restart` the games start anew."""
    agent = make_agent(config, spec)
    plain = Plain(agent, config, spec)
    agent.compute_advantages = then(agent.compute_advantages, plain.check_advantages, agent)
    agent.update_policy = then(agent.update_policy, plain.check_gradient_step, agent)
    per_rollout = config.agent.update_epochs * config.agent.num_minibatches
    for step in range(steps):
        if step in (0, restart):
            frames = script.begin()
            agent.begin(frames)
            plain.begin(frames)
        plain.check_playing(agent)
        actions = agent.act()
        plain.check_action(agent, actions)
        rewards, terminations, truncations, frames, played = script.step()
        agent.observe(actions, rewards, terminations, truncations, frames, played)
        plain.observe(rewards, terminations, truncations, frames, played)
        due = plain.in_rollout == config.agent.num_steps
        assert agent.update() == due * per_rollout
        if due:
            assert not plain.minibatches, "gradient steps are missing"
            if plain.curious or "pixel_control" in plain.tasks:
                plain.update_statistics(time + 1 for time in plain.rollout)
            plain.check_metrics(agent)
    plain.check_playing(agent)
    if agent.rnd is not None:
        pairs = zip(agent.rnd.target.parameters(), plain.target.parameters(), strict=True)
        assert all(torch.equal(theirs, ours) for theirs, ours in pairs), "RND's target never learns"
    return plain


# ---------------------------------------------------------------- whole updates


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


AGENT = st.fixed_dictionaries(
    {
        "num_steps": one_of(4, 6),
        "gamma": one_of(0.5, 0.95, 1.0),
        "gae_lambda": one_of(0.0, 0.7, 1.0),
        "ext_coef": one_of(0.0, 0.5, 2.0),
        "clip_coef": one_of(0.02, 0.2),
        "ent_coef": one_of(0.0, 0.1),
        "normalize_advantages": st.booleans(),
        "clip_rewards": st.booleans(),
        "reward_scale": one_of(1.0, 0.3, -0.5),
        "max_grad_norm": one_of(0.0, 0.05, 0.5),
        "update_epochs": one_of(1, 3),
        "num_minibatches": one_of(1, 2, 4),
        "learning_rate": one_of(1e-3, 5e-3),
        "learning_rate_decay": one_of(0, 20, 60),
        "optimizer": one_of("adam", "rmsprop"),
    }
)
RND = st.builds(
    PPORNDSettings,
    coef=one_of(0.0, 0.3, 1.0, 2.0),
    gamma=one_of(0.0, 0.6, 0.99),
    init_steps=one_of(2, 5),
    init_updates=one_of(0, 3),
)
TASK_SETTINGS = st.builds(
    TaskSettings,
    pixel_control=st.just(0.0),
    reward_prediction=one_of(0.0, 0.3, 1.0),
    value_replay=one_of(0.0, 0.5, 2.0),
    replay_length=one_of(1, 7, 40),
    window=one_of(1, 3, 4),
    num_windows=one_of(3, 5),
    reward_batch=one_of(32, 35),
    pixel_gamma=one_of(0.0, 0.9),
    scale_pixels=st.booleans(),
    returns=one_of("nstep", "gae"),
)


def configured(num_envs: int, agent: dict[str, Any], rnd: PPORNDSettings, tasks: TaskSettings) -> PPORunConfig:
    """A run of so many environments with these settings."""
    return replace(settings(tasks, num_envs=num_envs, **agent), rnd=rnd)


def steps_to_learn(config: PPORunConfig, rollouts: int) -> int:
    """Steps until so many rollouts were learned: random ones, or a first window, come before."""
    window = config.tasks.window if any(task_weights(config.tasks).values()) else 1
    return max(config.rnd.init_steps if config.rnd.coef else 0, window) + rollouts * config.agent.num_steps


@hypothesis.settings(few, max_examples=30)
@given(one_of(2, 4), AGENT, RND, TASK_SETTINGS, one_of(0.4, 0.4, 0.0, 1.0), st.booleans(), st.integers(0, 99))
def test_every_number_of_a_run_is_the_plain_ones(
    num_envs: int,
    agent: dict[str, Any],
    rnd: PPORNDSettings,
    tasks: TaskSettings,
    rewarded: float,
    restart: bool,
    seed: int,
) -> None:
    config = configured(num_envs, agent, rnd, tasks)
    first = steps_to_learn(config, 1)
    plain = check_run(
        config,
        VECTOR,
        Script(VECTOR, num_envs, seed, rewarded),
        steps_to_learn(config, 3),
        restart=first + 2 if restart else -1,
    )
    assert plain.gradient_steps == (2 if restart else 3) * agent["update_epochs"] * agent["num_minibatches"]


@hypothesis.settings(few, max_examples=7)
@given(
    rnd=one_of(0.0, 0.5),
    weights=one_of((1.0, 0.0, 0.0), (0.4, 0.0, 1.0), (2.0, 0.5, 0.5)),
    tasks=TASK_SETTINGS,
    obs_type=one_of("image", "ram"),
    max_grad_norm=one_of(0.0, 0.05),
    seed=st.integers(0, 99),
)
def test_so_is_every_number_of_a_run_with_pictures(
    rnd: float,
    weights: tuple[float, float, float],
    tasks: TaskSettings,
    obs_type: Any,
    max_grad_norm: float,
    seed: int,
) -> None:
    pixel_control, prediction, replayed = weights
    tasks = replace(tasks, pixel_control=pixel_control, reward_prediction=prediction, value_replay=replayed, window=3)
    changes = {"num_steps": 4, "num_minibatches": 2, "update_epochs": 1, "max_grad_norm": max_grad_norm}
    config = configured(2, changes, PPORNDSettings(coef=rnd, init_steps=4, init_updates=0), tasks)
    config = replace(config, env=replace(config.env, obs_type=obs_type))  # RAM's stacks repeat the first frame
    check_run(config, PICTURE, Script(PICTURE, 2, seed), steps_to_learn(config, 2))


def test_of_many_environments_the_predictor_learns_a_share() -> None:
    config = configured(
        64, {"num_steps": 2, "update_epochs": 1, "num_minibatches": 2}, PPORNDSettings(coef=1.0, init_steps=2), PPO_RND
    )
    check_run(config, VECTOR, Script(VECTOR, 64), steps_to_learn(config, 1))


# ---------------------------------------------------------------- clocks


def play(agent: PPOAgent, script: Script, steps: int, begin: bool = True) -> list[int]:
    """Let the agent play so many steps; returns the gradient steps after each."""
    if begin:
        agent.begin(script.begin())
    learned = []
    for _ in range(steps):
        actions = agent.act()
        agent.observe(actions, *script.step())
        learned.append(agent.update())
    return learned


@pytest.mark.parametrize(
    ("rnd", "tasks", "first"),
    [(0.0, PPO_RND, 1), (0.0, VECTOR_TASKS, 3), (0.1, PPO_RND, 5), (0.1, VECTOR_TASKS, 5)],
    ids=["one step", "a window", "the random start", "the longer of both"],
)
def test_rollouts_begin_after(rnd: float, tasks: TaskSettings, first: int) -> None:
    config = settings(tasks, num_envs=2, rnd=rnd, num_steps=4, update_epochs=3, num_minibatches=2)
    learned = play(make_agent(config, VECTOR), Script(VECTOR, 2), first + 8)
    assert learned == [0] * (first + 3) + [6] + [0] * 3 + [6]


def test_a_window_longer_than_the_random_start_is_waited_for() -> None:
    tasks = replace(VECTOR_TASKS, window=7)
    learned = play(make_agent(settings(tasks, num_envs=2, num_steps=4), VECTOR), Script(VECTOR, 2), 11)
    assert learned == [0] * 10 + [16]


def test_new_games_begin_a_new_rollout() -> None:
    agent, script = make_agent(settings(num_envs=2, num_steps=4), VECTOR), Script(VECTOR, 2)
    assert play(agent, script, 5 + 3) == [0] * 8
    assert play(agent, script, 4) == [0, 0, 0, 16]


def test_the_learning_rate_of_both_optimizers_follows_the_steps_played() -> None:
    config = settings(num_envs=2, num_steps=4, learning_rate=1e-3, learning_rate_end=2e-4, learning_rate_decay=40)
    agent = make_agent(config, VECTOR)
    script = Script(VECTOR, 2)
    play(agent, script, 5)
    rates = []
    for _ in range(6):
        play(agent, script, 4, begin=False)
        assert agent.rnd_optimizer is not None
        rate, other = (optimizer.param_groups[0]["lr"] for optimizer in (agent.optimizer, agent.rnd_optimizer))
        assert rate == other == pytest.approx(1e-3 - 8e-4 * min(agent.global_step / 40, 1))
        rates.append(rate)
    assert rates[0] > 2e-4 and rates[-1] == pytest.approx(2e-4), "the end was not reached"


# ---------------------------------------------------------------- acting


def test_actions_are_drawn_from_the_softmax_of_the_newest_observation() -> None:
    size = 6_000
    agent = make_agent(settings(num_envs=size, rnd=0.0), VECTOR)
    frames = np.repeat(
        np.array([[3, 0, -3], [-3, 0, 3]], dtype=np.float32), size // 2, axis=0
    )  # two kinds of observations
    agent.begin(frames[::-1])  # not these
    yes, no = np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
    agent.observe(agent.act(), np.zeros(size), no, no, frames, yes)
    actions = agent.act()
    with torch.no_grad():
        expected = agent.policy(torch.from_numpy(frames[[0, -1]]))[0].softmax(dim=1)
    assert (expected[0] - expected[1]).abs().max() > 0.1, "the two would look the same"
    for kind, probabilities in zip(actions.view(2, -1), expected, strict=True):
        shares = torch.bincount(kind, minlength=3) / len(kind)
        torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)


def test_what_the_agent_thought_is_kept_whatever_it_learns_later() -> None:
    agent, script = make_agent(settings(num_envs=2, rnd=0.0, num_steps=4), VECTOR), Script(VECTOR, 2)
    play(agent, script, 1)
    obs = agent.replay.latest()
    with torch.no_grad():
        logits, *values = agent.policy(obs)
        actions = agent.act().clone()
        for parameter in agent.policy.parameters():
            parameter.zero_()
    rollout = agent.rollout
    torch.testing.assert_close(rollout.log_probs[0], logits.log_softmax(dim=1)[[0, 1], actions])
    torch.testing.assert_close(torch.stack([rollout.values_ext[0], rollout.values_int[0]]), torch.stack(values))


# ---------------------------------------------------------------- a resume


def tensors_of(state: Any, name: str = "") -> dict[str, Any]:
    """All that a state holds, by its path."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list):
        pairs = enumerate(state)
    else:
        return {name: state}
    return {path: leaf for key, part in pairs for path, leaf in tensors_of(part, f"{name}/{key}").items()}


def check_same(one: PPOAgent, other: PPOAgent) -> None:
    """Assert bit-equal states and equal clocks."""
    clocks = [(agent.global_step, agent.episodes, agent.num_updates, agent.epsilon) for agent in (one, other)]
    assert clocks[0] == clocks[1]
    first, second = (tensors_of(agent.state_dict(replay=True)) for agent in (one, other))
    assert first.keys() == second.keys() and len(first) > 30
    for name, leaf in first.items():
        same = torch.equal(leaf, second[name]) if isinstance(leaf, Tensor) else leaf == second[name]
        assert same, name


RESUMED = configured(
    2,
    {"num_steps": 4, "learning_rate_end": 1e-4, "learning_rate_decay": 100},
    PPORNDSettings(coef=0.5, init_steps=5, init_updates=10),
    VECTOR_TASKS,
)
RESUMED_PICTURES = replace(
    RESUMED,
    agent=replace(RESUMED.agent, update_epochs=1),
    tasks=replace(PPO_RND, pixel_control=1.0, num_windows=2, window=3, replay_length=20),
)
RANDOM_START, IN_A_ROLLOUT, AFTER_ROLLOUTS = 2, 5 + 6, 5 + 12
MOMENTS = [(RESUMED, VECTOR, steps) for steps in (RANDOM_START, IN_A_ROLLOUT, AFTER_ROLLOUTS)]
MOMENTS += [(RESUMED_PICTURES, PICTURE, IN_A_ROLLOUT), (replace(RESUMED, rnd=PPORNDSettings(coef=0)), VECTOR, 8)]
resumed = pytest.mark.parametrize(
    ("config", "spec", "steps"), MOMENTS, ids=["random start", "in a rollout", "after rollouts", "pictures", "no RND"]
)


@resumed
def test_with_its_replay_a_resumed_agent_goes_on_as_if_nothing_had_been(
    config: PPORunConfig, spec: EnvSpec, steps: int
) -> None:
    agent, script = make_agent(config, spec), Script(spec, 2)
    play(agent, script, steps)
    agent.metrics()
    twin = make_agent(config, spec, seed=1)
    twin.load_state_dict(copy.deepcopy(agent.state_dict(replay=True)))
    assert twin.epsilon == agent.epsilon
    again = copy.deepcopy(script)
    assert play(twin, again, 9) == play(agent, script, 9)
    assert agent.num_updates > 0
    check_same(twin, agent)
    np.testing.assert_equal(twin.metrics(), agent.metrics())


@resumed
def test_without_its_replay_all_else_is_restored(config: PPORunConfig, spec: EnvSpec, steps: int) -> None:
    agent, script = make_agent(config, spec), Script(spec, 2)
    play(agent, script, steps)
    state = copy.deepcopy(agent.state_dict())
    assert state["replay"] is None
    twin = make_agent(config, spec, seed=1)
    twin.load_state_dict(state)
    assert len(twin.replay) == 0 < len(agent.replay)
    agent._set_learning_rate()  # a resumed agent has that of now, the other one still that of its last update
    twin.replay.load_state_dict(copy.deepcopy(agent.replay.state_dict()))
    check_same(twin, agent)
