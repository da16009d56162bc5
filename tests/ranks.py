"""Run by torchrun: what the ranks compute together, and what rank 0 does alone, written to files.

    torchrun --nproc-per-node 2 tests/ranks.py FOLDER dqn ppo

In place of random numbers there are fixed ones, the same for one process with all games as for two ranks with half of
them each: which action is chosen, which transitions are sampled, which rows make up a minibatch.
"""

import os
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from gravitar_dqn import losses
from gravitar_dqn.agents import entry_of
from gravitar_dqn.config import RunConfig, build, nest
from gravitar_dqn.envs import spec_of
from gravitar_dqn.loop import play
from gravitar_dqn.presets import get_preset
from gravitar_dqn.replay import ReplayBuffer
from gravitar_dqn.runtime import distributed

RANKS, ENVS, UPDATES = 2, 4, 50  # environments of all ranks, gradient steps
VECTOR, PICTURE = (6,), (84, 84)


class Clockwork(VectorEnv[Any, Any, Any]):
    """Games without chance. Game g of environment i ends after 5 + (i + g) % 4 steps, every third by a time-out."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, first: int, num_envs: int, shape: tuple[int, ...]) -> None:
        self.num_envs, self._shape = num_envs, shape
        self._index = np.arange(first, first + num_envs)
        picture = shape == PICTURE
        self.single_observation_space = gym.spaces.Box(
            0 if picture else -1, 255 if picture else 1, shape, np.uint8 if picture else np.float32
        )
        self.single_action_space = gym.spaces.Discrete(3)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._game, self._step = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs, np.int64)
        self._sum, self._ended = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.bool_)
        return self._obs(), {}

    def _obs(self) -> Any:
        size = int(np.prod(self._shape))
        phase = 0.7 * self._index + 1.3 * self._game + 0.4 * self._step + self._sum
        waves = np.sin(phase[:, None] + np.linspace(0, 9, size)).reshape(-1, *self._shape)
        return (127 * (waves + 1)).astype(np.uint8) if self._shape == PICTURE else waves.astype(np.float32)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        fresh = self._ended
        self._game, self._step = self._game + fresh, np.where(fresh, 0, self._step + 1)
        self._sum = np.where(fresh, 0.0, self._sum + 0.1 * actions)
        over = ~fresh & (self._step >= 5 + (self._index + self._game) % 4)
        by_time = over & (self._game % 3 == 2)
        rewards = np.where(fresh, 0.0, 100.0 * ((self._step + self._index + actions) % 3 - 1))
        self._ended = over
        return self._obs(), rewards, over & ~by_time, by_time, {}


SETTINGS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "dqn": (
        "cartpole",
        VECTOR,
        {
            "agent": {"batch_size": 16, "buffer_size": 400, "learning_starts": 40, "learning_rate": 1e-3},
            "rnd": {"coef": 0.1, "init_updates": 5, "update_frequency": 2},
        },
    ),
    "priorities": (
        "cartpole",
        VECTOR,
        {
            "agent": {
                "batch_size": 16,
                "buffer_size": 400,
                "learning_starts": 40,
                "priority_exponent": 0.7,
                "importance_exponent": 0.5,
            },
        },
    ),
    "ppo": (
        "randal-cartpole",
        VECTOR,
        {
            "agent": {"num_steps": 8, "num_minibatches": 2, "learning_rate": 1e-3},
            "rnd": {"coef": 0.5, "init_steps": 1, "init_updates": 5},
            "tasks": {"pixel_control": 0.0, "reward_prediction": 0.0, "value_replay": 0.0},
        },
    ),
    "randal": (
        "randal-cartpole",
        VECTOR,
        {
            "agent": {"num_steps": 8, "num_minibatches": 2, "learning_rate": 1e-3},
            "rnd": {"coef": 0.5, "init_steps": 1, "init_updates": 5},
            "tasks": {"replay_length": 60, "window": 6, "num_windows": 4, "reward_batch": 32, "value_replay": 1.0},
        },
    ),
    # Small steps: convolutions with ReLU double a rounding error within a few.
    "pictures": (
        "randal",
        PICTURE,
        {
            "agent": {"num_steps": 8, "num_minibatches": 2, "learning_rate": 5e-6},
            "rnd": {"coef": 0.5, "init_steps": 1, "init_updates": 5},
            "tasks": {"replay_length": 60, "window": 6, "num_windows": 4, "reward_batch": 32},
        },
    ),
}


def parts() -> list[int]:
    """The ranks whose part this process plays: its own, or, alone, all."""
    return [distributed.rank()] if distributed.size() > 1 else list(range(RANKS))


class FixedChoices:
    """Stands in for random numbers. Every part of the games has a stream of its own."""

    def __init__(self) -> None:
        self._streams = {part: np.random.default_rng(part) for part in parts()}

    def pick(self, weights: torch.Tensor, count: int) -> torch.Tensor:
        """Flat indices of `count` entries of a grid (rows, environments) by their weights, as many of each part."""
        found = []
        width = weights.shape[1] // len(self._streams)
        for i, stream in enumerate(self._streams.values()):
            own = weights[:, i * width : (i + 1) * width].double()
            sums = own.reshape(-1).cumsum(0)
            draws = torch.from_numpy(stream.random(count // len(self._streams))) * sums[-1]
            chosen = torch.searchsorted(sums, draws, right=True).clamp(max=own.numel() - 1)
            found.append(chosen // width * weights.shape[1] + chosen % width + i * width)
        return torch.cat(found)

    def draw(self, buffer: ReplayBuffer, count: int, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What `ReplayBuffer._draw` gives, the probabilities without their sum, which cancels."""
        indices = self.pick(buffer.sampling_weights, count)
        return indices, buffer.sampling_weights.view(-1)[indices].double()

    def sample_where(self, buffer: ReplayBuffer, eligible: torch.Tensor, count: int, generator: Any) -> Any:
        eligible = (buffer.sampling_weights > 0) & eligible
        return self.pick(eligible.float(), count), eligible.any()

    def order(self, count: int, minibatches: int, width: int) -> torch.Tensor:
        """An order of a rollout's rows in which every minibatch has as many of each part."""
        steps, share = count // width, width // len(self._streams)
        orders = []
        for i, stream in enumerate(self._streams.values()):
            own = torch.from_numpy(stream.permutation(steps * share))
            orders.append((own // share * width + own % share + i * share).view(minibatches, -1))
        return torch.cat(orders, dim=1).view(-1)


def fixed(agent: Any) -> None:
    """Take chance out of an agent."""
    choices = FixedChoices()
    losses.epsilon_greedy = lambda q_values, *rest: q_values.argmax(dim=1)
    losses.gumbel_scores = lambda logits, *rest: logits
    ReplayBuffer._draw = lambda buffer, *how: choices.draw(buffer, *how)  # type: ignore[method-assign]
    ReplayBuffer.sample_where = lambda buffer, *how: choices.sample_where(buffer, *how)  # type: ignore[method-assign]
    if hasattr(agent, "rollout"):
        agent._random_left = 0
        minibatches, width = agent.config.agent.num_minibatches, agent.config.env.num_envs
        torch.randperm = lambda count, **how: choices.order(count, minibatches, width)  # type: ignore[assignment]


def made(kind: str) -> tuple[RunConfig, Any, Any]:
    """The whole run's settings, this process's games and its agent."""
    preset, shape, changes = SETTINGS[kind]
    flat = {f"{group}.{name}": value for group, values in changes.items() for name, value in values.items()}
    flat |= {"env.num_envs": ENVS, "precision": "fp32", "execution": "eager", "device": "cpu"}
    config = build(get_preset(preset), nest(flat))
    torch.manual_seed(1)
    ours = distributed.share_of(config)
    envs = Clockwork(distributed.rank() * ours.env.num_envs, ours.env.num_envs, shape)
    return config, envs, entry_of(ours).make(ours, spec_of(envs), torch.device("cpu"))


def learn(kind: str) -> dict[str, Any]:
    """Losses and state after UPDATES gradient steps."""
    _, envs, agent = made(kind)
    fixed(agent)
    losses: list[float] = []
    name = "_q_loss" if hasattr(agent, "q_network") else "_policy_loss"
    before = getattr(agent, name)

    def noted(*rows: Any) -> Any:
        found = before(*rows)
        losses.append(float(found[0].detach()))
        return found

    setattr(agent, name, noted)
    games: list[Any] = []
    for episodes in play(envs, agent, seed=0):
        games += episodes
        if agent.num_updates >= (UPDATES if kind != "pictures" else 8):  # those are slow
            break
    clocks = [agent.global_step, agent.episodes, agent.stored, agent.num_updates]
    epsilons = getattr(agent, "_epsilon_ends_here", torch.zeros(agent.config.env.num_envs))
    found = {"losses": losses, "clocks": clocks, "games": len(games), "epsilons": epsilons}
    return found | {"state": agent.state_dict() | {"max_weight": agent.replay.max_weight}}


def tell() -> dict[str, Any]:
    """Each function of `distributed` on numbers that differ by rank: 0, 1, ... and 10, 11, ..."""
    first = 10.0 * distributed.rank()
    values = torch.arange(4.0) + first
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]) if distributed.rank() else torch.tensor([1.0, 0.0, 0.0, 0.0])
    weight = torch.zeros(4, requires_grad=True)
    distributed.weighted(losses.masked_mean(weight * values, mask), mask).backward()  # type: ignore[no-untyped-call]
    gradient = {torch.nn.Parameter(torch.zeros(4)): values.clone()}
    distributed.average_gradients([weight], gradient)  # type: ignore[list-item]
    games = [(first, 1)] * (1 + 2 * distributed.rank())
    return {
        "total": [part.tolist() for part in distributed.total(values, values[:1])],
        "masked_mean": distributed.masked_mean(values, mask).item(),
        "gradient": weight.grad.tolist(),  # type: ignore[union-attr]
        "other": next(iter(gradient.values())).tolist(),
        "largest": distributed.largest(values).item(),
        "gathered": distributed.gathered(values.view(2, 2)).tolist(),
        "own_part": distributed.own_part(torch.arange(4)).tolist(),
        "same": distributed.same({"rank": distributed.rank()}),
        "counts": distributed.counts(1, distributed.rank()),
        "all_games": distributed.all_games(games, 4),
        "no_games": distributed.all_games([], 0),
        "agreed": [distributed.agreed(130 * distributed.rank()), distributed.counts(0), distributed.agreed(0)],
    }


if __name__ == "__main__":
    folder, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    number = os.environ["RANK"]
    if number == "0":
        torch.save({kind: learn(kind) for kind in kinds}, Path(folder) / "alone.pt")
    with distributed.joined(get_preset("cartpole")):
        found = {"tell": tell()} | {kind: learn(kind) for kind in kinds}
        torch.save(found, Path(folder) / f"rank_{number}.pt")
