"""The DQN agent against an oracle: the same learning, clocks and acting written a second time, plainly and slowly."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import probes
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replay_helpers import check_valid
from torch import Tensor, nn

from gravitar_dqn import rnd
from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.config import DQNRunConfig, DQNSettings, EnvSettings, RNDSettings
from gravitar_dqn.evaluation import scores
from gravitar_dqn.evaluation.acting import Policy, play_games
from gravitar_dqn.evaluation.scores import evaluate
from gravitar_dqn.evaluation.trained_agent import Trained
from gravitar_dqn.loop import play
from gravitar_dqn.networks import make_q_network
from gravitar_dqn.presets import PRESETS

CPU = torch.device("cpu")
NUM_ENVS, FEATURES, NUM_ACTIONS = 3, 2, 3
SPEC = probes.spec_of_shape((FEATURES,), NUM_ACTIONS)

Key = TypeVar("Key", bound=Hashable)
Place = tuple[int, int]  # (time, environment) of a transition
Frame = npt.NDArray[np.float32]


@pytest.fixture(autouse=True, scope="module")
def _narrow_curiosity() -> Iterator[None]:
    """Curiosity's networks are as narrow as the rest here: 512 wide, they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnd, "WIDTH", 16)
        yield


# ---------------------------------------------------------------- what is fed to an agent


@dataclass(frozen=True)
class Step:
    """A step of one environment. `played` is false for the dummy one after a game's end, of which nothing counts."""

    obs: Frame
    action: int
    reward: float
    terminated: bool
    truncated: bool
    played: bool
    next_obs: Frame

    @property
    def done(self) -> bool:
        return self.played and (self.terminated or self.truncated)


def make_history(seed: int, length: int, num_envs: int = NUM_ENVS) -> list[list[Step]]:
    """Made-up steps of all environments, [time][environment], with deaths, time-outs and dummy steps."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(size=(length + 1, num_envs, FEATURES)).astype(np.float32)
    history: list[list[Step]] = []
    for t in range(length):
        played = [not step.done for step in history[-1]] if history else [True] * num_envs
        history.append(
            [
                Step(
                    obs=frames[t, env],
                    action=int(rng.integers(NUM_ACTIONS)),
                    reward=float(2 * rng.normal()),
                    terminated=bool(rng.random() < 0.15),
                    truncated=bool(rng.random() < 0.12),
                    played=played[env],
                    next_obs=frames[t + 1, env],
                )
                for env in range(num_envs)
            ]
        )
    return history


def begin(agent: DQNAgent, history: list[list[Step]]) -> None:
    agent.begin(np.stack([step.obs for step in history[0]]))


def feed(agent: DQNAgent, row: list[Step], actions: Tensor | None = None) -> None:
    """Let the agent observe one step of all environments, with other `actions` if given."""
    agent.observe(
        torch.tensor([step.action for step in row]) if actions is None else actions,
        np.array([step.reward for step in row]),
        np.array([step.terminated for step in row]),
        np.array([step.truncated for step in row]),
        np.stack([step.next_obs for step in row]),
        np.array([step.played for step in row]),
    )


def make_config(
    *, num_envs: int = NUM_ENVS, rnd_coef: float = 0.0, rnd_update_frequency: int = 1, seed: int = 5, **changes: Any
) -> DQNRunConfig:
    """A tiny learner in fp32; `changes` go to its DQNSettings."""
    agent = DQNSettings(
        network="notebook", buffer_size=24, learning_starts=8, batch_size=6, train_frequency=3, learning_rate=1e-2,
        target_network_frequency=0, tau=0.3, adam_epsilon=1e-3, gamma=0.9, n_step=2, reward_scale=0.5,
    )  # fmt: skip
    return DQNRunConfig(
        env=EnvSettings(num_envs=num_envs),
        agent=replace(agent, **changes),
        rnd=RNDSettings(
            coef=rnd_coef, learning_rate=1e-3, update_frequency=rnd_update_frequency, gamma=0.8, init_updates=2
        ),
        precision="fp32",
        execution="eager",
        seed=seed,
    )


def make_agent(config: DQNRunConfig) -> DQNAgent:
    torch.manual_seed(config.seed)
    return DQNAgent(config, SPEC, CPU)


# ---------------------------------------------------------------- the oracle


class HandAdam:
    """Adam (Kingma 2015, algorithm 1), as it is printed."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, epsilon: float) -> None:
        self.parameters, self.learning_rate, self.epsilon = list(parameters), learning_rate, epsilon
        self.m = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.v = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.t = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        self.t += 1
        for i, gradient in enumerate(gradients):
            self.m[i] = 0.9 * self.m[i] + 0.1 * gradient
            self.v[i] = 0.999 * self.v[i] + 0.001 * gradient**2
            m_hat, v_hat = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            self.parameters[i].data -= self.learning_rate * m_hat / (v_hat.sqrt() + self.epsilon)


@dataclass
class Statistics:
    """Mean and variance of all values seen, beside 1e-4 of a value with mean 0 and variance 1."""

    values: list[Any] = field(default_factory=list)

    @property
    def count(self) -> float:
        return len(self.values) + 1e-4

    @property
    def mean(self) -> Any:
        return sum(self.values) / self.count

    @property
    def var(self) -> Any:
        return (sum(value**2 for value in self.values) + 1e-4) / self.count - self.mean**2

    @property
    def std(self) -> Any:
        return np.sqrt(self.var + 1e-8)


def pick(weights: dict[Key, float], draw: float) -> Key:
    """The first key at which the running sum of the weights passes `draw` times all of it."""
    passed, level = 0.0, draw * sum(weights.values())
    for key, weight in weights.items():
        passed += weight
        if passed > level:
            return key
    raise AssertionError("the weights are all zero")


def huber(error: Tensor) -> Tensor:
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


class Oracle:
    """What an agent that was just made must hold after every call, in float64.

    It keeps every step for ever, and takes from the agent only the networks' first weights and its seed.
    """

    def __init__(self, agent: DQNAgent) -> None:
        self.config, self.agent = agent.config, agent.config.agent
        q_network: Any = agent.q_network  # whose layers work in float64, while its forward does not
        self.q_network: nn.Module = copy.deepcopy(q_network.layers).double()
        self.target_network = copy.deepcopy(self.q_network)
        self.adam = HandAdam(self.q_network.parameters(), self.agent.learning_rate, self.agent.adam_epsilon)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.num_rows = math.ceil(self.agent.buffer_size / NUM_ENVS) + self.agent.n_step
        self.history: list[list[Step]] = []
        self.weights: dict[Place, float] = {}  # what the sampling probability is proportional to
        self.max_weight = 1.0
        self.global_step = self.episodes = self.num_updates = 0
        self.next_train, self.next_sync = self.agent.train_frequency, self.agent.target_network_frequency
        self.logged: dict[str, list[float]] = {"td_loss": [], "q_mean": []}
        self.curious = self.config.rnd.coef != 0
        if self.curious:
            curiosity: Any = copy.deepcopy(agent.rnd)
            self.rnd_target, self.predictor = curiosity.target.double(), curiosity.predictor.double()
            epsilon = self.agent.adam_epsilon
            self.rnd_adam = HandAdam(self.predictor.parameters(), self.config.rnd.learning_rate, epsilon)
            self.predictor_updates = 0
            self.bonuses: dict[Place, float] = {}
            self.obs_rms, self.reward_rms = Statistics(), Statistics()
            self.int_returns = [0.0] * NUM_ENVS
            self.logged |= {"rnd_loss": [], "int_reward_mean": [], "int_reward_max": []}

    @property
    def clock(self) -> int:
        return self.global_step if self.agent.clock == "steps" else self.episodes

    # ------------------------------------------------------------ playing

    def observe(self, row: list[Step]) -> None:
        self.history.append(row)
        self.global_step += sum(step.played for step in row)
        self.episodes += sum(step.done for step in row)
        completed = len(self.history) - self.agent.n_step  # the newest time whose window has all its frames
        if completed >= 0:
            played = [env for env in range(NUM_ENVS) if self.history[completed][env].played]
            self.weights |= {(completed, env): self.max_weight for env in played}
        if self.curious:
            self._observe_bonuses(row)

    def _observe_bonuses(self, row: list[Step]) -> None:
        time, ready = len(self.history) - 1, self.predictor_updates >= self.config.rnd.init_updates
        bonuses = [self._error(step.next_obs).item() if step.played and ready else 0.0 for step in row]
        self.obs_rms.values += [step.next_obs.astype(np.float64) for step in row if step.played]
        for env, step in enumerate(row):
            self.bonuses[time, env] = bonuses[env]
            if step.played and ready:
                self.int_returns[env] = self.config.rnd.gamma * self.int_returns[env] + bonuses[env]
                self.reward_rms.values.append(self.int_returns[env])
        learned = [bonus / float(self.reward_rms.std) for bonus in bonuses]
        self.logged["int_reward_mean"] += [bonus for bonus, step in zip(learned, row, strict=True) if step.played]
        self.logged["int_reward_max"] += learned

    def _error(self, frame: Frame) -> Tensor:
        """The predictor's mean squared error on a frame."""
        seen = torch.as_tensor(np.clip((frame - self.obs_rms.mean) / self.obs_rms.std, -5, 5)).double()[None]
        error: Tensor = ((self.predictor(seen) - self.rnd_target(seen)) ** 2).mean()
        return error

    # ------------------------------------------------------------ learning

    def update(self) -> int:
        """All that is due; the number of gradient steps."""
        kept = self.history[max(0, len(self.history) + 1 - self.num_rows) :]  # the newest row has no action yet
        stored = min(sum(step.played for row in kept for step in row), NUM_ENVS * (self.num_rows - self.agent.n_step))
        if stored <= max(self.agent.learning_starts, self.agent.n_step * NUM_ENVS):
            self.next_train = self.clock + self.agent.train_frequency
            return 0
        if self.agent.learning_rate_decay > 0:
            share = min(1.0, self.global_step / self.agent.learning_rate_decay)
            self.adam.learning_rate = (1 - share) * self.agent.learning_rate + share * self.agent.learning_rate_end
        before = self.num_updates
        while self.next_train <= self.clock:
            self.next_train += self.agent.train_frequency
            for _ in range(self.agent.gradient_steps):
                self._gradient_step()
        if self.agent.target_network_frequency > 0 and self.next_sync <= self.clock:
            self._follow()
            while self.next_sync <= self.clock:
                self.next_sync += self.agent.target_network_frequency
        return self.num_updates - before

    def _gradient_step(self) -> None:
        self._learn_q()
        if self.agent.target_network_frequency == 0:
            self._follow()
        self.num_updates += 1
        if self.curious and self.num_updates % self.config.rnd.update_frequency == 0:
            self._learn_predictor()

    def _follow(self) -> None:
        """Move the target network a share `tau` of the way to the Q network."""
        for ours, online in zip(self.target_network.parameters(), self.q_network.parameters(), strict=True):
            ours.data = (1 - self.agent.tau) * ours.data + self.agent.tau * online.data

    def sampleable(self) -> dict[Place, float]:
        """Weights of the transitions that can be sampled, in the order of the ring's rows."""
        oldest = len(self.history) - self.num_rows + 1
        places = [place for place in self.weights if place[0] >= oldest]
        return {place: self.weights[place] for place in sorted(places, key=lambda p: (p[0] % self.num_rows, p[1]))}

    def _sample(self) -> list[Place]:
        """A batch: first a time is drawn, then one of its environments."""
        weights = self.sampleable()
        by_time = {t: sum(w for (time, _), w in weights.items() if time == t) for t, _ in weights}
        batch = []
        for draws in torch.rand(2, self.agent.batch_size, dtype=torch.float64, generator=self.generator).T.tolist():
            t = pick(by_time, draws[0])
            batch.append(pick({place: weight for place, weight in weights.items() if place[0] == t}, draws[1]))
        return batch

    def _window(self, place: Place) -> list[Step]:
        """Up to n steps of one game, from `place` on."""
        time, env = place
        window = [self.history[time][env]]
        while len(window) < self.agent.n_step and not window[-1].done:
            window.append(self.history[time + len(window)][env])
        return window

    def _target(self, place: Place) -> float:
        """What the value of the action at `place` is pulled to."""
        time, env = place
        window = self._window(place)
        value = 0.0
        for k, step in enumerate(window):
            reward = self.agent.reward_scale * step.reward
            if self.curious:
                reward += self.config.rnd.coef * self.bonuses[time + k, env] / float(self.reward_rms.std)
            value += self.agent.gamma**k * reward
        last = window[-1]
        if last.terminated or (last.truncated and self.agent.time_limit_is_terminal):
            return value
        next_obs = torch.as_tensor(last.next_obs).double()
        lagged = self.target_network(next_obs).tolist()
        choice = self.q_network(next_obs).tolist() if self.agent.double_q else lagged
        return float(value + self.agent.gamma ** len(window) * lagged[choice.index(max(choice))])

    def _importance(self, batch: list[Place]) -> list[float]:
        """(N P)^-exponent over its largest."""
        if self.agent.priority_exponent == 0:
            return [1.0] * len(batch)
        weights = self.sampleable()
        total = sum(weights.values())
        raw = [(len(weights) * weights[place] / total) ** -self.agent.importance_exponent for place in batch]
        return [weight / max(raw) for weight in raw]

    def _learn_q(self) -> None:
        batch = self._sample()
        loss, errors, values = torch.zeros(()).double(), [], []
        for place, importance in zip(batch, self._importance(batch), strict=True):
            step = self.history[place[0]][place[1]]
            q_values = self.q_network(torch.as_tensor(step.obs).double())
            error = self._target(place) - q_values[step.action]
            loss = loss + importance * huber(error) / len(batch)
            errors.append(error.item())
            values += q_values.tolist()
        gradients = torch.autograd.grad(loss, list(self.q_network.parameters()))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        if 0 < self.agent.max_grad_norm < norm:
            gradients = tuple(gradient * self.agent.max_grad_norm / norm for gradient in gradients)
        self.adam.step(gradients)
        if self.agent.priority_exponent > 0:
            for place, error in zip(batch, errors, strict=True):
                self.weights[place] = (abs(error) + 1e-6) ** self.agent.priority_exponent
                self.max_weight = max(self.max_weight, self.weights[place])
        self.logged["td_loss"].append(loss.item())
        self.logged["q_mean"].append(float(np.mean(values)))

    def _learn_predictor(self) -> None:
        batch = self._sample()
        torch.rand(self.agent.batch_size, generator=self.generator)  # which rows it learns from: here all
        self.predictor_updates += 1
        errors = [self._error(self._window(place)[-1].next_obs) for place in batch]
        loss = torch.stack(errors).mean()
        ready = self.predictor_updates >= self.config.rnd.init_updates
        for (time, env), error in zip(batch, errors, strict=True):
            last = time + len(self._window((time, env))) - 1
            self.bonuses[last, env] = error.item() if ready else 0.0
        self.rnd_adam.step(torch.autograd.grad(loss, self.rnd_adam.parameters))
        self.logged["rnd_loss"].append(loss.item())

    def metrics(self) -> dict[str, float]:
        """Means since the last call where there was anything, and values of now, as far as learning goes."""
        largest = self.logged.pop("int_reward_max", [])
        means = {name: float(np.mean(values)) for name, values in self.logged.items() if values}
        if "int_reward_mean" in means:
            means["int_reward_max"] = max(largest)
        self.logged = {name: [] for name in [*self.logged, "int_reward_max"]}
        return means | {
            "buffer_fill": min(1.0, (len(self.history) + 1) / self.num_rows),
            "learning_rate": self.adam.learning_rate,
        }


def assert_close(ours: Any, expected: Any, what: str) -> None:
    """Equal but for the agent's float32."""
    ours, expected = (torch.as_tensor(value).detach().double() for value in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-5, msg=lambda message: f"{what}: {message}")


def assert_same_network(network: nn.Module, expected: nn.Module, what: str) -> None:
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert_close(ours, theirs, what)


def assert_same_adam(optimizer: torch.optim.Optimizer, expected: HandAdam, what: str) -> None:
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(expected.parameters)
    assert_close(group["lr"], expected.learning_rate, what)
    for parameter, m, v in zip(group["params"], expected.m, expected.v, strict=True):
        state = optimizer.state[parameter]
        assert state.get("step", 0) == expected.t
        if expected.t:
            assert_close(state["exp_avg"], m, f"{what}: first moment")
            assert_close(state["exp_avg_sq"].sqrt(), v.sqrt(), f"{what}: second moment")


def assert_same_replay(agent: DQNAgent, oracle: Oracle) -> None:
    check_valid(agent.replay)
    weights, bonuses = torch.zeros(oracle.num_rows, NUM_ENVS), torch.zeros(oracle.num_rows, NUM_ENVS)
    for (time, env), weight in oracle.sampleable().items():
        weights[time % oracle.num_rows, env] = weight
    assert_close(agent.replay.sampling_weights, weights, "sampling weights")
    assert_close(agent.replay.max_weight, oracle.max_weight, "largest sampling weight")
    if oracle.curious:
        newest = len(oracle.history) % oracle.num_rows  # the row that waits for its action
        for (time, env), bonus in oracle.bonuses.items():  # the later ones take the place of the earlier
            bonuses[time % oracle.num_rows, env] = bonus
        bonuses[newest] = agent.replay.int_rewards[newest]
        assert_close(agent.replay.int_rewards, bonuses, "bonuses")


def assert_same_curiosity(curiosity: Any, oracle: Oracle) -> None:
    assert_same_network(curiosity.target, oracle.rnd_target, "RND target")
    assert_same_network(curiosity.predictor, oracle.predictor, "predictor")
    assert curiosity.updates == oracle.predictor_updates
    assert_close(curiosity.forward_filter.returns, oracle.int_returns, "intrinsic returns")
    for ours, expected in ((curiosity.obs_rms, oracle.obs_rms), (curiosity.reward_rms, oracle.reward_rms)):
        for name in ("mean", "var", "count"):
            assert_close(getattr(ours, name), getattr(expected, name), name)


def assert_agrees(agent: DQNAgent, oracle: Oracle) -> None:
    """All that the agent has learned, counted and stored is what the oracle has."""
    counts = (agent.global_step, agent.episodes, agent.num_updates)
    assert counts == (oracle.global_step, oracle.episodes, oracle.num_updates)
    assert_same_network(agent.q_network, oracle.q_network, "Q network")
    assert_same_network(agent.target_network, oracle.target_network, "target network")
    assert_same_adam(agent.optimizer, oracle.adam, "optimizer")
    assert_same_replay(agent, oracle)
    if oracle.curious:
        assert agent.rnd_optimizer is not None
        assert_same_curiosity(agent.rnd, oracle)
        assert_same_adam(agent.rnd_optimizer, oracle.rnd_adam, "predictor's optimizer")
    ours, expected = agent.metrics(), oracle.metrics()
    assert ours.keys() == expected.keys() | {"epsilon"}
    for name, value in expected.items():
        assert_close(ours[name], value, name)


# ---------------------------------------------------------------- learning

CONFIGS = st.builds(
    make_config,
    rnd_coef=st.sampled_from([0.0, 0.7]),
    rnd_update_frequency=st.integers(1, 3),
    buffer_size=st.sampled_from([12, 24, 60]),
    learning_starts=st.integers(3, 10),
    batch_size=st.integers(3, 8),
    clock=st.sampled_from(["steps", "steps", "episodes"]),
    train_frequency=st.integers(1, 6),
    gradient_steps=st.integers(1, 2),
    target_network_frequency=st.sampled_from([0, 0, 2, 5]),
    tau=st.sampled_from([0.3, 1.0]),
    learning_rate_end=st.just(1e-3),
    learning_rate_decay=st.sampled_from([0, 30]),
    adam_epsilon=st.sampled_from([1e-3, 1e-1]),
    max_grad_norm=st.sampled_from([0.0, 0.2, 10.0]),
    gamma=st.sampled_from([0.6, 0.9]),
    n_step=st.integers(1, 3),
    double_q=st.booleans(),
    reward_scale=st.sampled_from([0.3, 1.0]),
    time_limit_is_terminal=st.booleans(),
    priority_exponent=st.sampled_from([0.0, 0.6]),
    importance_exponent=st.sampled_from([0.4, 1.0]),
    policy=st.sampled_from(["online", "target"]),
)


# The same examples at every run: float32 may choose another bootstrap action than float64 where two are nearly alike.
@settings(max_examples=30, derandomize=True)
@given(config=CONFIGS, seed=st.integers(0, 10_000))
@example(config=make_config(rnd_coef=0.7, priority_exponent=0.6, n_step=3), seed=0)
@example(
    config=make_config(
        clock="episodes", train_frequency=1, gradient_steps=2, target_network_frequency=2, double_q=False,
        max_grad_norm=0.2, time_limit_is_terminal=True, buffer_size=60, learning_rate_decay=30,
    ),
    seed=1,
)  # fmt: skip
def test_all_that_is_learned_is_what_the_oracle_learns(config: DQNRunConfig, seed: int) -> None:
    agent, history = make_agent(config), make_history(seed, length=14)
    oracle = Oracle(agent)
    begin(agent, history)
    for row in history:
        feed(agent, row)
        oracle.observe(row)
        assert agent.update() == oracle.update()
        assert_agrees(agent, oracle)
    assert torch.equal(agent.generator.get_state(), oracle.generator.get_state()), "other random numbers were drawn"


def test_an_optimizer_has_its_own_network_s_weights_and_no_other_network_is_trained() -> None:
    agent: Any = make_agent(make_config(rnd_coef=0.5))
    for optimizer, network in ((agent.optimizer, agent.q_network), (agent.rnd_optimizer, agent.rnd.predictor)):
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert held == [id(parameter) for parameter in network.parameters()]
    assert not any(p.requires_grad for p in [*agent.target_network.parameters(), *agent.rnd.target.parameters()])


# ---------------------------------------------------------------- clocks

Event = tuple[int, str]  # gradient steps, and initials of the networks that changed: Q, target, predictor (in order)


def quiet_row(ends: Sequence[bool], played: Sequence[bool]) -> list[Step]:
    """Random frames and rewards; games end where `ends`."""
    steps = make_history(0, 1, len(ends))[0]
    return [
        replace(step, terminated=end, truncated=False, played=was_played)
        for step, end, was_played in zip(steps, ends, played, strict=True)
    ]


def weights_of(agent: DQNAgent) -> dict[str, list[Tensor]]:
    """Copies of the weights of every network, by its initial."""
    curiosity: Any = agent.rnd
    networks = {"q": agent.q_network, "t": agent.target_network, "p": curiosity.predictor, "frozen": curiosity.target}
    return {name: [p.detach().clone() for p in network.parameters()] for name, network in networks.items()}


def timeline(agent: DQNAgent, rows: Iterable[list[Step]]) -> dict[int, Event]:
    """What `update` did at every time of the agent's clock at which it did something."""
    happened: dict[int, Event] = {}
    for row in rows:
        feed(agent, row)
        before = weights_of(agent)
        count, after = agent.update(), weights_of(agent)
        changed = [name for name in before if not all(map(torch.equal, before[name], after[name]))]
        if count or changed:
            assert agent.clock not in happened, "learned twice at the same time"
            happened[agent.clock] = (count, "".join(changed))
    return happened


def two_games(**changes: Any) -> DQNAgent:
    """An agent of two environments that has begun."""
    agent = make_agent(make_config(num_envs=2, rnd_coef=0.5, n_step=1, buffer_size=100, **changes))
    begin(agent, make_history(0, 1, 2))
    return agent


ON, OFF = quiet_row([False] * 2, [True] * 2), quiet_row([True] * 2, [False] * 2)


def test_rounds_predictor_steps_and_target_copies_come_at_their_own_steps() -> None:
    agent = two_games(
        learning_starts=6, train_frequency=5, gradient_steps=2, target_network_frequency=8, tau=0.5,
        rnd_update_frequency=3,
    )  # fmt: skip
    happened = timeline(agent, [ON, ON, ON, OFF, *[ON, OFF, OFF] * 10])
    # 6 steps are stored at 6, not more: the first round is due at 6 + 5, and every 5 from then on, though steps come
    # in twos. The target network's clock is 8, 16, 24: at 8 it equals the Q network. Predictor: updates 3, 6.
    assert happened == {12: (2, "q"), 16: (2, "qtp"), 22: (2, "qp"), 24: (0, "t"), 26: (2, "q")}
    assert agent.messages == ["Matching network values"] * 3
    assert agent.num_updates == 8


def test_a_clock_of_episodes_moves_with_games_only() -> None:
    agent = two_games(
        clock="episodes", learning_starts=6, train_frequency=2, gradient_steps=3, target_network_frequency=3, tau=0.5,
        rnd_update_frequency=5,
    )  # fmt: skip
    one, both = quiet_row([True, False], [True] * 2), quiet_row([True] * 2, [True] * 2)
    other = quiet_row([False] * 2, [False, True])
    games = [one, other]
    happened = timeline(agent, [ON, ON, ON, ON, ON, *games, *games, ON, ON, both, OFF, both, OFF, *games])
    # Rounds are due after games 2, 4 and 6, the target network after 3 and 6; games 3 and 4 end together. Predictor: at
    # update 5.
    assert happened == {2: (3, "q"), 4: (3, "qtp"), 6: (3, "qt")}


def test_a_step_of_many_environments_does_every_round_that_it_passed() -> None:
    agent = two_games(learning_starts=2, train_frequency=1, gradient_steps=2, target_network_frequency=0)
    assert timeline(agent, [ON] * 4) == {4: (4, "qtp"), 6: (4, "qtp"), 8: (4, "qtp")}


def test_the_averaged_target_moves_at_gradient_steps_alone() -> None:
    agent = two_games(learning_starts=2, train_frequency=4, target_network_frequency=0, rnd_update_frequency=9)
    assert timeline(agent, [ON] * 8) == {6: (1, "qt"), 10: (1, "qt"), 14: (1, "qt")}
    assert agent.messages == []


def test_n_steps_of_every_environment_are_stored_before_learning_starts() -> None:
    agent = make_agent(make_config(num_envs=2, n_step=4, learning_starts=0, train_frequency=1))
    begin(agent, make_history(0, 1, 2))
    done = []
    for _ in range(6):
        feed(agent, ON)
        done.append(agent.update())
    assert done == [0, 0, 0, 0, 2, 2]


def test_the_learning_rate_is_of_the_step_whatever_the_clock() -> None:
    agent = two_games(
        clock="episodes", learning_starts=6, learning_rate=1e-2, learning_rate_end=2e-3, learning_rate_decay=16
    )
    rates = []
    for row in [ON] * 10:
        feed(agent, row)
        agent.update()
        rates.append(agent.metrics()["learning_rate"])
    assert rates == pytest.approx([1e-2] * 3 + [6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 2e-3, 2e-3])


def test_the_predictor_s_learning_rate_stays() -> None:
    agent: Any = two_games(learning_starts=2, train_frequency=1, learning_rate_decay=4)
    timeline(agent, [ON] * 4)
    assert [group["lr"] for group in agent.rnd_optimizer.param_groups] == [1e-3]


# ---------------------------------------------------------------- acting


def expected_actions(q_values: Tensor, epsilons: Sequence[float], generator: torch.Generator) -> list[int]:
    """Random where the environment's draw is below its epsilon, else the first of the largest Q value."""
    draws = torch.rand(len(epsilons), generator=generator).tolist()
    random = torch.randint(q_values.shape[1], (len(epsilons),), generator=generator).tolist()
    greedy = [row.index(max(row)) for row in q_values.tolist()]
    return [r if u < e else g for u, e, r, g in zip(draws, epsilons, random, greedy, strict=True)]


def twin(generator: torch.Generator) -> torch.Generator:
    """A generator that goes on with the same numbers."""
    return torch.Generator().set_state(generator.get_state())


@pytest.mark.parametrize("policy", ["online", "target"])
@pytest.mark.parametrize(("clock", "decay"), [("steps", 100), ("episodes", 30)])
def test_every_environment_acts_by_its_own_epsilon_on_the_network_that_plays(
    clock: Any, decay: int, policy: Any
) -> None:
    num_envs = 24
    config = make_config(
        num_envs=num_envs, clock=clock, policy=policy, epsilon_start=0.8, epsilon_end=0.3, epsilon_decay=decay,
        epsilon_ladder=4.0,
    )  # fmt: skip
    agent, history = make_agent(config), make_history(1, 10, num_envs)
    with torch.no_grad():
        for weights in agent.target_network.parameters():
            weights.normal_(std=0.3)
    network = agent.q_network if policy == "online" else agent.target_network
    begin(agent, history)
    steps = games = 0
    for row in history:
        now = steps if clock == "steps" else games
        ends = [0.3 ** (1 + 4.0 * i / (num_envs - 1)) for i in range(num_envs)]
        epsilons = [0.8 + (end - 0.8) * min(1, now / decay) for end in ends]
        obs, generator = torch.from_numpy(np.stack([step.obs for step in row])), twin(agent.generator)
        actions = agent.act()
        assert actions.tolist() == expected_actions(network(obs), epsilons, generator)
        assert agent.epsilon == pytest.approx(np.mean(epsilons)) == agent.metrics()["epsilon"]
        assert agent.policy is network
        feed(agent, row, actions)
        steps, games = steps + sum(s.played for s in row), games + sum(s.done for s in row)
    assert now > decay, "the schedule's end was not reached"
    assert not torch.equal(agent.q_network(obs).argmax(1), agent.target_network(obs).argmax(1)), "networks act alike"


def test_learning_changes_what_the_next_action_is_chosen_by() -> None:
    agent, history = make_agent(make_config(epsilon_start=0.0, epsilon_end=0.0, policy="online")), make_history(2, 12)
    begin(agent, history)
    for row in history:
        feed(agent, row)
        agent.update()
        q_values = agent.q_network(torch.from_numpy(np.stack([step.next_obs for step in row])))
        assert agent.act().tolist() == q_values.argmax(1).tolist()
    assert agent.num_updates > 0


class Counted(probes.Probe):
    """RAM whose bytes are all 10 times the game's number, plus the frames of it so far."""

    length, game = 2, 0
    action_space = gym.spaces.Discrete(NUM_ACTIONS)
    observation_space = gym.spaces.Box(0, 255, (128,), np.uint8)

    def reset(self, **how: Any) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        self.game += 1
        return super().reset(**how)

    def see(self) -> npt.NDArray[Any]:
        return np.full(128, 10 * self.game + self.time + 1, dtype=np.uint8)


class LongCounted(Counted):
    """Games of three steps."""

    length = 3


class Recorder(nn.Module):
    """Scores an action 1, the remainder of the newest frame's number, and the others 0; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))
        self.shown: list[list[list[int]]] = []  # [time][environment][frame]

    def forward(self, obs: Tensor) -> Tensor:
        assert obs.dtype == torch.uint8 and obs.shape == (2, 2, 128)
        self.shown.append(obs[:, :, 0].tolist())
        return nn.functional.one_hot(obs[:, -1, 0].long() % NUM_ACTIONS, NUM_ACTIONS).float() + self.anything


def evaluate_recorder(network: Recorder, *, epsilon: float, padding: Any = "zero", **how: Any) -> list[list[int]]:
    """Play six games of the two lengths side by side; returns the actions [time][environment]."""
    config = make_config(num_envs=7, stack_padding=padding, epsilon_start=1.0, epsilon_end=1.0)
    actions: list[list[int]] = []
    envs = SyncVectorEnv([Counted, LongCounted], autoreset_mode=AutoresetMode.NEXT_STEP)
    policy = Policy(
        config, network, probes.spec_of_shape((2, 128), NUM_ACTIONS), 2, epsilon=epsilon, seed=3,
        on_act=lambda obs, chosen: actions.append(chosen.tolist()),
    )  # fmt: skip
    play_games(envs, policy, 6, seed=0, **how)
    return actions


def column(network: Recorder, env: int) -> list[tuple[int, ...]]:
    return [tuple(stacks[env]) for stacks in network.shown]


@pytest.mark.parametrize(("padding", "before"), [("zero", [0, 0]), ("repeat", [11, 21])])
def test_an_agent_is_shown_the_frames_of_one_game_only(padding: Any, before: list[int]) -> None:
    config = make_config(num_envs=2, policy="online", stack_padding=padding, learning_starts=1_000)
    agent = DQNAgent(config, probes.spec_of_shape((2, 128), NUM_ACTIONS), CPU)
    agent.q_network = network = Recorder()
    envs = SyncVectorEnv([Counted, LongCounted], autoreset_mode=AutoresetMode.NEXT_STEP)
    for _ in islice(play(envs, agent, seed=0), 5):
        pass
    first, second = before
    assert column(network, 0) == [(first, 11), (11, 12), (12, 13), (second, 21), (21, 22)]
    assert column(network, 1) == [(first, 11), (11, 12), (12, 13), (13, 14), (second, 21)]


def test_evaluation_shows_the_network_the_frames_of_one_game_only() -> None:
    network = Recorder()
    evaluate_recorder(network, epsilon=0.0)
    assert column(network, 0)[:7] == [(0, 11), (11, 12), (12, 13), (0, 21), (21, 22), (22, 23), (0, 31)]
    assert column(network, 1)[:7] == [(0, 11), (11, 12), (12, 13), (13, 14), (0, 21), (21, 22), (22, 23)]


def test_evaluation_pads_the_stack_as_in_training() -> None:
    network = Recorder()
    evaluate_recorder(network, epsilon=0.0, padding="repeat")
    assert column(network, 0)[:4] == [(11, 11), (11, 12), (12, 13), (21, 21)]


def test_evaluation_starts_a_stack_anew_where_a_game_is_cut_off() -> None:
    network = Recorder()
    evaluate_recorder(network, epsilon=0.0, max_steps=2)
    assert column(network, 0)[:4] == [(0, 11), (11, 12), (12, 13), (0, 21)]
    assert column(network, 1)[:5] == [(0, 11), (11, 12), (0, 21), (21, 22), (0, 31)]


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_evaluation_plays_by_its_own_epsilon_and_never_by_the_run_s(epsilon: float) -> None:
    network, generator = Recorder(), torch.Generator().manual_seed(3)
    actions = evaluate_recorder(network, epsilon=epsilon)
    assert len(actions) == len(network.shown) > 8
    for stacks, chosen in zip(network.shown, actions, strict=True):
        scores = torch.eye(NUM_ACTIONS)[[stack[-1] % NUM_ACTIONS for stack in stacks]]
        assert chosen == expected_actions(scores, [epsilon] * 2, generator)


def test_evaluating_a_trained_agent_plays_its_weights_by_the_epsilon_and_seed_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PRESETS["cartpole"]
    weights = make_q_network(probes.spec_of_shape((4,), 2), config.agent).state_dict()
    policies: list[Policy] = []

    class Kept(Policy):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            super().__init__(*arguments, **how)
            policies.append(self)

    monkeypatch.setattr(scores, "Policy", Kept)
    evaluate(Trained("cartpole", config, weights, 0, None), episodes=3, epsilon=0.25, seed=9, device=CPU)
    (policy,) = policies
    torch.testing.assert_close(dict(policy.network.state_dict()), dict(weights), rtol=0, atol=0)
    assert policy.epsilon.tolist() == [0.25] * 3
    assert policy.generator.initial_seed() == 9


# ---------------------------------------------------------------- resuming


def held(agent: DQNAgent, *, replay: bool) -> dict[str, Any]:
    """Copies of all that an agent holds, taken from its parts and not from its `state_dict`."""
    optimizers = [optimizer for optimizer in (agent.optimizer, agent.rnd_optimizer) if optimizer is not None]
    networks = [agent.q_network, agent.target_network, agent.rnd]
    parts = {
        "networks": [dict(network.state_dict()) for network in networks if network is not None],
        "optimizers": [list(optimizer.state.values()) for optimizer in optimizers],
        "generator": agent.generator.get_state(),
        "counts": [agent.global_step, agent.episodes, agent.num_updates, agent.clock],
        "epsilon": agent.epsilon,
    }
    return copy.deepcopy(parts | ({"replay": agent.replay.state_dict()} if replay else {}))


def assert_identical(ours: Any, expected: Any) -> None:
    """Equal to the bit."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def go_on(agent: DQNAgent, history: list[list[Step]]) -> list[tuple[int, list[int], dict[str, float]]]:
    """Begin, and play and learn through a history; returns gradient steps, actions and metrics of every step."""
    begin(agent, history)
    told = []
    for row in history:
        actions = agent.act().clone()
        feed(agent, row, actions)
        told.append((agent.update(), actions.tolist(), agent.metrics()))
    return told


def saved(agent: DQNAgent, *, replay: bool) -> dict[str, Any]:
    """The agent's state, by way of a file's bytes."""
    file = io.BytesIO()
    torch.save(agent.state_dict(replay=replay), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


RESUMED = {
    "copies, priorities, curiosity": {
        "target_network_frequency": 11, "priority_exponent": 0.6, "rnd_coef": 0.5, "rnd_update_frequency": 2,
        "learning_rate_decay": 60, "gradient_steps": 3, "policy": "target", "epsilon_decay": 70,
    },
    "averages, games": {"clock": "episodes", "train_frequency": 2, "policy": "online", "epsilon_decay": 12},
}  # fmt: skip


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_resumed_with_its_replay_an_agent_goes_on_to_the_bit(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    agent = make_agent(config)
    go_on(agent, make_history(1, 13))
    resumed = make_agent(replace(config, seed=6))
    resumed.load_state_dict(saved(agent, replay=True))
    assert_identical(held(resumed, replay=True), held(agent, replay=True))
    agent.messages.clear()
    told, expected = (go_on(one, make_history(2, 12)) for one in (resumed, agent))
    assert [row[:2] for row in told] == [row[:2] for row in expected]
    assert_identical([row[2] for row in told], [row[2] for row in expected])
    assert_identical(held(resumed, replay=True), held(agent, replay=True))
    assert resumed.messages == agent.messages


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_resumed_without_its_replay_an_agent_has_all_but_that(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    agent = make_agent(config)
    go_on(agent, make_history(1, 13))
    resumed = make_agent(replace(config, seed=6))
    resumed.load_state_dict(saved(agent, replay=False))
    assert_identical(held(resumed, replay=False), held(agent, replay=False))
    assert (len(resumed.replay), resumed.partial_buffer_size) == (0, 0)
    history = make_history(3, 1)
    for one in (resumed, agent):
        begin(one, history)
    assert resumed.act().tolist() == agent.act().tolist()


def test_a_state_without_replay_holds_none() -> None:
    agent = make_agent(make_config())
    assert agent.state_dict()["replay"] is None
    assert agent.state_dict(replay=True)["replay"] is not None


@pytest.mark.parametrize(
    ("policy", "network"), [("online", lambda agent: agent.q_network), ("target", lambda agent: agent.target_network)]
)
def test_the_weights_kept_for_playing_are_those_of_the_network_that_acts(
    policy: Any, network: Callable[[DQNAgent], nn.Module]
) -> None:
    agent = make_agent(make_config(policy=policy))
    go_on(agent, make_history(1, 13))
    assert_identical(dict(saved(agent, replay=False)["policy"]), dict(network(agent).state_dict()))
    assert not torch.equal(next(agent.q_network.parameters()), next(agent.target_network.parameters()))
