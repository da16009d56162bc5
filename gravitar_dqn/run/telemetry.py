"""What a run reports while it trains: console lines, a progress line, `metrics.csv` and `episodes.csv`.

Standard output carries only the console lines, whose forms other programs parse; the log goes to standard error.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gravitar_dqn.agents.base import Agent
from gravitar_dqn.config import RunConfig
from gravitar_dqn.errors import NotFinite, NotSaved, RankLost
from gravitar_dqn.loop import Episode
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.logs import forget_unwritten
from gravitar_dqn.runtime import distributed

METRICS = (
    "wall_seconds global_step frames num_updates episodes sps return_mean return_min return_max int_reward_mean "
    "epsilon td_loss rnd_loss q_mean buffer_fill int_reward_max samples_per_second"
).split()
EPISODES = "global_step episodic_return episodic_length".split()

log = logging.getLogger(__name__)


class Tracker:
    """Writes a row of `metrics.csv` every `log_seconds` and a row of `episodes.csv` for every game."""

    def __init__(
        self, run_dir: Path, config: RunConfig, agent: Agent, frames_per_step: int, state: dict[str, Any] | None = None
    ) -> None:
        self._config, self._agent, self._frames_per_step = config, agent, frames_per_step
        self._columns = [*METRICS, *(name for name in agent.metric_names if name not in METRICS)]
        self._returns: deque[float] = deque(state["returns"] if state else (), maxlen=100)
        last_step = agent.global_step if state else None
        self._metrics = CsvLog(run_dir / "metrics.csv", self._columns, last_step)
        self._episodes = CsvLog(run_dir / "episodes.csv", EPISODES, last_step)
        self._wall_before = float(state["wall_seconds"]) if state else 0.0
        self._start = self._last = time.monotonic()
        self._last_step, self._last_updates = agent.global_step, agent.num_updates
        self._bar = tqdm(
            total=config.total_steps,
            initial=agent.global_step,
            unit=" steps",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )

    @property
    def wall_seconds(self) -> float:
        """Training time, that of earlier sessions of a resumed run included."""
        return self._wall_before + time.monotonic() - self._start

    def step(self, episodes: list[Episode]) -> None:
        """Note finished games; write a row when it is time."""
        for episode in episodes:
            self._returns.append(episode.episodic_return)
            self._episodes.add([episode.global_step, f"{episode.episodic_return:g}", episode.episodic_length])
        if time.monotonic() - self._last >= self._config.log_seconds:
            self._report()

    def finish(self) -> None:
        """Write the last row; NotFinite when a number in it is NaN or infinite."""
        if self._agent.global_step > self._last_step:
            self._report()

    def _report(self) -> None:
        for name, value in self._tick().items():
            if value is not None and not math.isfinite(value):
                raise NotFinite(f"{name} is {value}")

    def _tick(self) -> dict[str, float | None]:
        now, agent = time.monotonic(), self._agent
        seconds = max(now - self._last, 1e-9)
        steps, updates = agent.global_step - self._last_step, agent.num_updates - self._last_updates
        scores = np.array(self._returns)  # of the last 100 games; none before the first has ended
        row: dict[str, float | None] = {
            "wall_seconds": round(self.wall_seconds, 3),
            "global_step": agent.global_step,
            "frames": agent.global_step * self._frames_per_step,
            "num_updates": agent.num_updates,
            "episodes": agent.episodes,
            "sps": round(steps / seconds, 1),
            **{f"return_{name}": float(getattr(scores, name)()) for name in ("mean", "min", "max") if len(scores)},
            "samples_per_second": round(updates * agent.batch_size * distributed.size() / seconds, 1),
            **agent.metrics(),
        }
        self._metrics.add([_cell(row.get(name)) for name in self._columns])
        self._metrics.flush()
        self._episodes.flush()
        if self._config.total_minutes:  # the bar counts steps: as many as the time may be enough for
            expected = agent.global_step * self._config.total_minutes * 60 / max(self.wall_seconds, 1e-9)
            self._bar.total = min(self._config.total_steps, max(int(expected), agent.global_step))
        self._bar.update(steps)
        if self._returns:
            self._bar.set_postfix_str(f"games {agent.episodes}, mean score {row['return_mean']:.0f}", refresh=False)
        self._last, self._last_step, self._last_updates = now, agent.global_step, agent.num_updates
        return row

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint. What was reported so far is written out first, so that the files and it agree.

        OSError while there is no room for that; other trouble with a file is no reason to lose the weights too.
        """
        for file in (self._metrics, self._episodes):
            file.flush()
            if file.full:
                raise OSError(f"checkpoint not written: {file.path} has no room for the rows before it")
        return {"returns": list(self._returns), "wall_seconds": self.wall_seconds}

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what waits, and a last row; NotSaved when that cannot be done, a warning after another error."""
        self._bar.close()
        complaints = []
        waits = kind is RankLost and distributed.over_nccl()  # the GPU, perhaps for ever
        if self._agent.global_step > self._last_step and not waits:
            try:
                self._tick()
            except Exception as error:  # as after the death of a device: that has ended the run, and is told
                complaints.append(f"{self._metrics.path} has no last row ({error})")
        for file in (self._metrics, self._episodes):
            file.flush()
            if file.waiting:
                complaints.append(f"{file.path} could not be written: its last {file.waiting} rows are lost")
        if complaints and kind is None:
            raise NotSaved("; ".join(complaints))
        for complaint in complaints:
            log.warning(complaint)


def _cell(value: float | None) -> str:
    if value is None:  # this agent has no such thing
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3f}"


class Console:
    """The lines that other programs parse, to the letter."""

    def __init__(self, agent: Agent, state: dict[str, Any] | None = None) -> None:
        self._agent = agent
        self._silent = False
        self._since_mark: list[float] = list(state["since_mark"]) if state else []
        self._best: tuple[float, int] = (state["best"][0], state["best"][1]) if state else (-math.inf, 0)

    def step(self, episodes: list[Episode]) -> None:
        """Print what the finished games call for."""
        for message in self._agent.messages:
            self._print(message)
        self._agent.messages.clear()
        for episode in episodes:
            number, score = episode.number, episode.episodic_return
            self._since_mark.append(score)
            if number % 5 == 0:
                size = self._agent.partial_buffer_size
                fill = "" if size is None else f", buffer size: {size}"
                self._print(f"episode: {number}, score: {score:.0f}, epsilon: {self._agent.epsilon:.3f}{fill}")
            if number % 100 == 0:
                marks = f"mean_score: {np.mean(self._since_mark):.2f}, std_score: {np.std(self._since_mark):.2f}"
                self._print(f"marking, episode: {number}, score: {score:.1f}, {marks}")
                self._since_mark.clear()

    def video(self, number: int, score: float) -> None:
        """A recorded game is on the disk."""
        if score > self._best[0]:
            self._best = (score, number)
        self._print(f"video: {number}, score: {score:.0f} (best {self._best[0]:.1f} at episode {self._best[1]})")

    def _print(self, line: str) -> None:
        if self._silent:
            return
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:  # a full disk, or a reader that has gone
            self._silent = True
            forget_unwritten(sys.stdout)
            log.warning(
                "standard output cannot be written (%s): no more console lines, training goes on", error.strerror
            )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"since_mark": self._since_mark, "best": list(self._best)}
