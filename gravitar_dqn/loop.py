"""The loop: it plays, lets the agent learn, and knows no agent in particular, and no files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from line_profiler import profile

from gravitar_dqn.agents.base import Agent
from gravitar_dqn.runtime import distributed

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Episode:
    """A finished game."""

    number: int  # counted from 0
    global_step: int  # when it ended
    episodic_return: float  # raw score
    episodic_length: int  # agent steps


class Observer(Protocol):
    """Something that follows a run. It must not slow it down."""

    def step(self, episodes: list[Episode]) -> None:
        """Called after every step of the vector environment with the games that it finished."""


class Timer:
    """Where a loop's wall-clock time goes, by name.

    Args:
        synchronize: waits for the device at the end of every section, so that its work is counted where it was
            launched; that itself costs time. None: only the host is watched.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block as `name`'s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronize is not None:
                self._synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def table(self, steps: int) -> str:
        """Seconds, share and microseconds for each of `steps` agent steps, a line for each section."""
        total = max(sum(self.seconds.values()), 1e-9)
        lines = [f"where the time went, {steps} steps:"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            each = 1e6 * seconds / max(steps, 1)
            lines.append(f"  {name:8s} {seconds:9.2f} s {seconds / total:6.1%} {each:9.1f} us a step")
        return "\n".join(lines)


@profile
def play(
    envs: Any, agent: Agent, seed: int, *, overlap: bool = False, timer: Timer | None = None
) -> Iterator[list[Episode]]:
    """Play and learn for ever; yields the games that each step of the vector environment finished.

    Knows nothing of logs, checkpoints or the end. The step after a game's end is Gymnasium's NEXT_STEP reset: no
    action is played there, so it counts neither as a step nor towards a score.

    Args:
        envs: a vector environment of Gymnasium's.
        agent: who plays.
        seed: of the games.
        overlap: learn while the emulator plays, which takes environments with `send` and `recv`. What a step brings is
            then learned after the next actions were chosen instead of before.
        timer: measures where the time goes.
    """
    timed = timer if timer is not None else Timer()
    obs, _ = envs.reset(seed=seed)
    agent.begin(obs)
    number = agent.episodes
    scores = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs, dtype=np.int64)
    played = np.ones(envs.num_envs, dtype=np.bool_)
    while True:
        with timed("act"):
            actions = agent.act()
            on_host = actions.cpu().numpy()  # this is a CPU-GPU sync point
        if overlap:
            envs.send(on_host)
            with timed("learn"):
                agent.update()
        with timed("emulate"):
            obs, rewards, terminations, truncations, _ = envs.recv() if overlap else envs.step(on_host)
        with timed("store"):
            agent.observe(actions, rewards, terminations, truncations, obs, played)
        if not overlap:
            with timed("learn"):
                agent.update()

        scores += rewards * played
        lengths += played
        ended = (terminations | truncations) & played
        games = [(float(scores[i]), int(lengths[i])) for i in np.flatnonzero(ended)]
        finished = []
        for score, length in distributed.all_games(games, agent.episodes - number):
            finished.append(Episode(number, agent.global_step, score, length))
            number += 1
        scores[ended], lengths[ended] = 0.0, 0
        played = ~ended
        with timed("report"):
            yield finished


def can_overlap(envs: Any, agent: Agent) -> bool:
    """Whether to learn while the emulator plays. On a CPU they would only take each other's cores."""
    return agent.learns_while_playing and agent.device.type == "cuda" and hasattr(envs, "send")
