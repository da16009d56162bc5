"""Evaluations while a run trains, by another process: `evaluations.csv`, and the best policy as `checkpoints/best`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gravitar_dqn.agents.base import Agent
from gravitar_dqn.config import RunConfig
from gravitar_dqn.evaluation.background import Worker, serve
from gravitar_dqn.evaluation.scores import evaluate
from gravitar_dqn.evaluation.trained_agent import from_run
from gravitar_dqn.loop import Episode
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.files import read_rows
from gravitar_dqn.runtime.clock import Every

COLUMNS = "global_step episodes games mean std median iqm iqm_low iqm_high".split()  # the first two are the run's
EPSILON = 0.001
OTHER_GAMES = 1_000_003  # so that `evaluate.py` plays others than those by which the best was chosen

log = logging.getLogger(__name__)


class Evaluator:
    """Has the policy evaluated every `eval_every` steps, as `evaluate.py` does it, and keeps the best checkpoint.

    While games are played no further evaluation is begun: training waits only for the checkpoint that is evaluated to
    be written. A failure is one warning, and the run goes on without evaluations.

    Args:
        run_dir: the run's folder.
        config: the run's settings.
        agent: who trains.
        state: makes the contents of a checkpoint.
        resumed: whether the run goes on: its evaluations stay, also those of steps that will be played again.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, agent: Agent, state: Callable[[], dict[str, Any]], *, resumed: bool
    ) -> None:
        self._run_dir, self._config, self._agent, self._state = run_dir, config, agent, state
        self._every = Every(config.eval_every, agent.global_step)
        self._ordered = -1  # the step of the newest order
        self._candidate = checkpoint.folder(run_dir) / "candidate.pt"
        module = "gravitar_dqn.evaluation.evaluator"
        self._worker = Worker(module, "the evaluating process ended", "no more evaluations: ")
        self._best = mean_of_best(run_dir) if resumed else None
        if config.eval_every:
            self._rows = CsvLog(run_dir / "evaluations.csv", COLUMNS, 2**62 if resumed else None)

    def step(self, episodes: list[Episode]) -> None:
        """Collect an evaluation that is done; order one when it is time."""
        if self._worker.busy:
            self._collect()
        if self._worker.free and self._every.due(self._agent.global_step):
            self._order()

    def _order(self) -> None:
        step = self._agent.global_step
        try:
            checkpoint.write(self._candidate, self._state())
        except OSError as error:
            log.warning("an evaluation after %d steps is left out: %s", step, error)
            return
        try:
            self._worker.order(
                {
                    "run_dir": str(self._run_dir),
                    "checkpoint": str(self._candidate),
                    "games": self._config.eval_episodes,
                    "episodes": self._agent.episodes,
                    "seed": self._config.seed + OTHER_GAMES,
                }
            )
            self._ordered = step
        except OSError as error:
            self._worker.give_up(error)

    def _collect(self, timeout: float = 0.0) -> None:
        answer = self._worker.answer(timeout)
        if answer is None:
            return
        low, high = answer["iqm_ci95"]
        row = {**answer, "iqm_low": low, "iqm_high": high}
        self._rows.add([row[name] if isinstance(row[name], int) else f"{row[name]:g}" for name in COLUMNS])
        self._rows.flush()
        mean, best = answer["mean"], self._best is None or answer["mean"] > self._best
        log.info("evaluated after %d steps: mean %.1f%s", answer["global_step"], mean, ", the best so far" * best)
        if best:
            try:
                checkpoint.keep_best(self._run_dir, self._candidate, answer["global_step"])
                self._best = mean
            except OSError as error:
                log.warning("the best checkpoint could not be kept: %s", error)

    def finish(self, interrupted: Callable[[], bool]) -> None:
        """Evaluate the policy that the run has ended with, and wait for it unless `interrupted`."""
        if self._config.eval_every and not self._worker.failed and self._ordered != self._agent.global_step:
            log.info("the last policy is being evaluated; Ctrl-C leaves that out")
            self._wait(interrupted)
            if self._worker.free and not interrupted():
                self._order()
        self._wait(interrupted)

    def _wait(self, interrupted: Callable[[], bool]) -> None:
        while self._worker.busy and not interrupted():
            self._collect(timeout=0.2)

    def close(self) -> None:
        """End the process. An evaluation in the making takes minutes: it is not waited for."""
        if self._worker.busy:
            self._collect()
        self._worker.close()
        with contextlib.suppress(OSError):
            self._candidate.unlink(missing_ok=True)


def mean_of_best(run_dir: Path) -> float | None:
    """The score for which the best checkpoint was kept; None without one: evaluations.csv may tell of others."""
    best = max((path.stem for path in checkpoint.folder(run_dir).glob("best_*.pt")), default="")
    for row in reversed(read_rows(run_dir / "evaluations.csv")):
        if best == f"best_{int(row['global_step']):012d}":
            return float(row["mean"])
    return None


def _evaluate(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of an Evaluator, as long as that lives."""
    parent = os.getppid()
    trained = from_run(Path(order["run_dir"]), Path(order["checkpoint"]))
    how = {"episodes": order["games"], "epsilon": EPSILON, "seed": order["seed"]}
    cpu = torch.device("cpu")
    result = evaluate(trained, **how, device=cpu, interrupted=lambda: os.getppid() != parent)
    counts = {"global_step": trained.global_step, "episodes": order["episodes"], "games": result["episodes"]}
    return result | counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(_evaluate)
