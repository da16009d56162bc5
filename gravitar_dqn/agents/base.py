"""What agents share: clocks, the way of a step into the replay buffer, captured functions, named metrics, and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from line_profiler import profile
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.config import RunConfig
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.replay import Bools, ReplayBuffer
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import Graphed, choose_execution, choose_precision, restore_generator

Array = npt.NDArray[Any]

CLOCKS = ("global_step", "episodes", "num_updates")


@dataclass(frozen=True)
class Insight:
    """What an agent makes of one observation, for the panel beside a film."""

    title: str  # of the values
    values: npt.NDArray[np.float32]  # (A,), one for each action
    bonus: float | None = None  # the predictor's error; None without curiosity
    cells: npt.NDArray[np.float32] | None = None  # (21, 21), the pixel control map


Look = Callable[[Tensor], Insight]


@dataclass(frozen=True)
class AgentEntry:
    """An agent as the rest of the package sees it. Its settings are those of the run's configuration."""

    make: Callable[[Any, EnvSpec, torch.device], Any]
    """(config, spec, device) -> an agent that the loop can play and train."""
    make_policy: Callable[[Any, EnvSpec], nn.Module]
    """(config, spec) -> the network that acts, with fresh weights; those of `policy_state` fit it."""
    action_scores: Callable[[nn.Module, Tensor, torch.Generator], Tensor]
    """(that network, obs (N, *obs_shape), random numbers) -> (N, A); the action is the one with the largest."""
    make_look: Callable[[Any, EnvSpec, nn.Module, Mapping[str, Any] | None], Look]
    """(config, spec, the network that acts, a checkpoint's state or None) -> what is shown beside a film."""


class Stateful(Protocol):
    """Something whose state a checkpoint holds, such as a network or an optimizer."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take over what `state_dict` returned."""


class Means:
    """Means of named values between two log ticks, summed on the device: adding to them never waits for it.

    Args:
        names: what is averaged, all over the same count.
        device: where the values are computed.
        largest: a further name, of which the largest value is kept.
    """

    def __init__(self, names: Sequence[str], device: torch.device, largest: str = "") -> None:
        self.names = (*names, largest) if largest else tuple(names)
        self._averaged, self._largest = tuple(names), largest
        self._sums = torch.zeros(len(self._averaged) + 1, device=device)  # the last one is the count
        self._max = torch.full((), -torch.inf, device=device)

    def add(self, values: Mapping[str, Tensor], count: Tensor | None = None) -> None:
        """Take in values, scalars; or the sums of `count` values, a scalar."""
        count = torch.ones_like(self._max) if count is None else count.float()
        self._sums += torch.stack([*(values[name].detach().float() for name in self._averaged), count])
        if self._largest:
            self._max.copy_(torch.maximum(self._max, values[self._largest].float()))

    def take(self) -> dict[str, float]:
        """The means since the last call; nothing where nothing was added."""
        *sums, count, largest = torch.cat([self._sums, self._max[None]]).tolist()  # this is a CPU-GPU sync point
        self._sums.zero_()
        self._max.fill_(-torch.inf)
        if not count:
            return {}
        means = {name: total / count for name, total in zip(self._averaged, sums, strict=True)}
        return means | ({self._largest: largest} if self._largest else {})


class Agent:
    """An agent that learns from a replay buffer: what the loop, and a run around it, ask of one.

    Networks work in functions that take and return nothing, on tensors that stay where they are, so that a CUDA graph
    can hold each of them. Nothing reads a number back from the device but `metrics`, at a log tick.

    A subclass sets `batch_size`, `optimizer` and `_means`, has `policy`, `act`, `update`, `_capture` and `_parts`, and
    calls `_capture` at the end of its `__init__`.

    Args:
        config: the run's settings.
        spec: what the environments show and take.
        device: where networks, replay and all statistics live.
        replay: where every step goes.
    """

    learns_while_playing = False  # it may learn while the emulator plays, one step behind
    batch_size: int  # samples in a gradient step
    optimizer: torch.optim.Optimizer  # of what the policy learns with

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device, replay: ReplayBuffer) -> None:
        self.config, self.spec, self.device, self.replay = config, spec, device, replay
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=choose_precision(config.precision, device) == "bf16"
        )
        self._graphs = choose_execution(config.execution, device) == "graphs"
        self._obs = torch.zeros((config.env.num_envs, *spec.obs_shape), dtype=spec.frame_dtype, device=device)
        self._actions = torch.zeros(config.env.num_envs, dtype=torch.int64, device=device)
        self._means: list[Means] = []
        self.messages: list[str] = []  # lines for the console
        self.global_step = 0  # agent steps played, over all environments
        self.episodes = 0  # games finished
        self.num_updates = 0  # gradient steps
        self.stored = 0  # transitions in the replay buffer, with those in other ranks'

    # ---------------------------------------------------------------- playing

    @property
    def policy(self) -> nn.Module:
        """The network that acts, is evaluated and filmed."""
        raise NotImplementedError

    @property
    def epsilon(self) -> float:
        """Probability of an action that the policy did not choose."""
        return 0.0

    @property
    def partial_buffer_size(self) -> int | None:
        """Transitions stored while the replay buffer is not full yet; None from then on."""
        return None if self.replay.full else self.stored

    def begin(self, obs: Array) -> None:
        """Start with the frames (num_envs, *frame_shape) of freshly reset environments."""
        self.replay.begin(obs)
        self.replay.latest(out=self._obs)

    def act(self) -> Tensor:
        """Actions (num_envs,) int64 for the newest frames, on the device."""
        raise NotImplementedError

    @profile
    def observe(
        self, actions: Tensor, rewards: Array, terminations: Bools, truncations: Bools, next_obs: Array, played: Bools
    ) -> None:
        """Take in one step of every environment; arrays as Gymnasium returns them.

        `played` (num_envs,) is false where the step was the dummy one after a game's end.
        """
        self.replay.put(actions, rewards, terminations, truncations, next_obs, played)
        self.replay.latest(out=self._obs)
        ended = (terminations | truncations) & played
        steps, games, self.stored = distributed.counts(int(played.sum()), int(ended.sum()), len(self.replay))
        self.global_step += steps
        self.episodes += games

    # ---------------------------------------------------------------- learning

    def update(self) -> int:
        """Learn what is due; returns the number of gradient steps.

        Called after `observe`, or, where learning overlaps the emulator's playing, after the `act` that follows it.
        """
        raise NotImplementedError

    def _scheduled_learning_rate(self, settings: Any) -> float:
        """What settings with a learning_rate, its _end and its _decay say of this step."""
        start, end, decay = settings.learning_rate, settings.learning_rate_end, settings.learning_rate_decay
        return float(losses.linear_schedule(start, end, decay, self.global_step))

    def _prepared(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        """The functions as they run: captured in CUDA graphs, or as they are."""
        if not self._graphs:
            return list(functions)
        return [Graphed(function, self.generator, self.device) for function in functions]

    def _capture(self) -> None:
        """Decide how optimizers and functions run; with graphs, capture anew, for the tensors of now."""
        raise NotImplementedError

    # ---------------------------------------------------------------- metrics and state

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Its columns in metrics.csv: `measured`, and where an agent says more, some that stay empty."""
        return self.measured

    @property
    def measured(self) -> tuple[str, ...]:
        """The names in `metrics`."""
        return (*(name for means in self._means for name in means.names), *self._present_metrics())

    def _present_metrics(self) -> dict[str, float]:
        """Current values, beside the means."""
        return {"buffer_fill": self.replay.fill, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def metrics(self) -> dict[str, float]:
        """Means since the last call, where there are any, and current values. NaN or infinity in them ends the run."""
        means = {name: value for group in self._means for name, value in group.take().items()}
        return means | self._present_metrics()

    def policy_state(self) -> dict[str, Any]:
        """Weights of the network that acts, for recordings."""
        return self.policy.state_dict()

    def _parts(self) -> dict[str, Stateful | None]:
        """All that has a state of its own, by its name in a checkpoint."""
        raise NotImplementedError

    def _counters(self) -> tuple[str, ...]:
        """Further integers that a checkpoint holds, by the names of their attributes without the underscore."""
        return ()

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """All that learning depends on; the replay buffer only where asked for."""
        return {
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            **{name: getattr(self, f"_{name}") for name in self._counters()},
            "policy": self.policy_state(),  # one of the parts again; torch stores it once
            "generator": self.generator.get_state(),
            "clocks": {name: getattr(self, name) for name in CLOCKS},
            "replay": self.replay.state_dict() if replay else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Then call `begin`."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        for name in self._counters():
            setattr(self, f"_{name}", int(state[name]))
        for name in CLOCKS:
            setattr(self, name, int(state["clocks"][name]))
        restore_generator(self.generator, state["generator"], self.config.seed + self.global_step)
        if state["replay"] is not None:
            self.replay.load_state_dict(state["replay"])
        self.stored = len(self.replay)
        self._capture()  # the optimizers have new tensors
