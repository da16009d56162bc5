"""A campaign: the GPU tests, the benchmark, then the longest run that the rest of the time allows, and its results.

It is done in calls that are shorter than a device is lent for, each of which goes on where the one before it ended,
by itself or by a kill. A stage that fails is noted, and the next one follows.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Literal

from gravitar_dqn import checkpoint, files, processes
from gravitar_dqn.campaign_plan import (
    CUT_SHORT,
    DONE,
    FAILED,
    SKIPPED,
    CampaignConfig,
    Stage,
    State,
    arguments_of,
    claim,
    free_arguments,
)
from gravitar_dqn.campaign_table import table
from gravitar_dqn.config import RunConfig
from gravitar_dqn.errors import UserError

if TYPE_CHECKING:
    from gravitar_dqn.training import Stop

ROOT = Path(__file__).resolve().parent.parent
NOTE_SECONDS = 2.0  # from one writing of campaign.json to the next
NO_SNAPSHOTS = "kept no checkpoints of its last sixth"  # from the words of `snapshots`
TRIES = 2  # calls that may begin a stage other than training
End = Literal["done", "failed", "cut short", "stopped"]


def run(options: CampaignConfig, read: Callable[[Sequence[str]], RunConfig]) -> int:
    """Do what fits into this call. 1 when all is done and a stage did not end well, else 0.

    `read` returns the configuration that arguments of `train` stand for; UserError when they cannot be.
    """
    began = monotonic() - processes.age()  # on a busy machine the imports take seconds
    check_here(options, read(arguments_of(options)))
    from gravitar_dqn.run_dir import holds_other, lock
    from gravitar_dqn.training import Stop

    if holds_other(options.dir, "campaign.json"):
        raise UserError(f"{options.dir} exists and is not a campaign's folder: another --dir starts anew")
    with lock(options.dir):
        state = claim(options)
        with Stop() as stop, processes.hang_up_stops():
            campaign = Campaign(options, state, began, stop)
            try:
                campaign.work()
            finally:
                campaign.note()
                (options.dir / "table.md").write_text(told := table(options, state))
        if state.next is None:
            print(told, end="")
            return int(state.failed)
        left = max(options.minutes - state.seconds / 60, 0)
        print(
            f"{'stopped' if stop.requested else 'end of this piece'}; next: {state.next}, {left:.1f} minutes are left"
        )
        print(f"the same command goes on: {processes.command_again()}")
        return 0


def check_here(options: CampaignConfig, config: RunConfig) -> None:
    """Raise UserError for a game or a device that is not on this machine."""
    from gravitar_dqn.envs import find_game
    from gravitar_dqn.execution import check_execution, choose_device

    find_game(config.env)
    check_execution(config.execution, choose_device(options.device))


class Campaign:
    """One call's work on a campaign."""

    def __init__(self, options: CampaignConfig, state: State, began: float, stop: Stop) -> None:
        self._options, self._state, self._stop = options, state, stop
        self._began, self._before = began, state.seconds
        self._noted = began
        self._end = began + options.piece_seconds - options.margin  # what still runs then is asked to end,
        self._last = self._end + options.margin / 3  # and then made to; this program starts and ends in the rest
        self._fresh = True  # nothing was started in this call
        (options.dir / "logs").mkdir(exist_ok=True)

    # ------------------------------------------------------------ time

    @property
    def _left(self) -> float:
        """Seconds of this call."""
        return self._end - monotonic()

    @property
    def _training_left(self) -> float:
        """Seconds of the campaign that are for training."""
        used = self._before + monotonic() - self._began
        return 60 * self._options.minutes - used - self._options.reserve

    def note(self) -> None:
        """Write down the time used so far."""
        self._noted = monotonic()
        self._state.seconds = self._before + self._noted - self._began
        self._state.save(self._options.dir)

    # ------------------------------------------------------------ stages

    def work(self) -> None:
        """Stage after stage, until the call's time is over."""
        while (name := self._state.next) is not None and not self._stop.requested:
            getattr(self, f"_{name}")(self._state.stages[name])
            self.note()
            stage = self._state.stages[name]
            if not stage.outcome:
                return
            print(f"{name}: {stage.outcome}{f' ({stage.said})' if stage.said else ''}", flush=True)

    def _tests(self, stage: Stage) -> None:
        from gravitar_dqn.execution import choose_device

        if not (ROOT / "tests" / "test_gpu.py").exists():
            _ended(stage, SKIPPED, "this is not a clone of the repository")
        elif choose_device(self._options.device).type != "cuda":
            _ended(stage, SKIPPED, "no CUDA device")
        elif importlib.util.find_spec("pytest") is None:
            _ended(stage, SKIPPED, "pytest is not installed")
        else:
            words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
            self._simple("tests", stage, words, cwd=ROOT, before_training=True)

    def _benchmark(self, stage: Stage) -> None:
        words = ["bench", "--quick", f"--device={self._options.device}"]
        words += [f"--json={self._options.dir / 'benchmark.json'}"]
        if self._options.quick:
            words += ["--no-peers", "--rounds=1", "--seconds=0.1", "--num-envs=16", "--sizes", "1000"]
        self._simple("benchmark", stage, processes.package_command(words), before_training=True)
        if stage.outcome == DONE:
            stage.said = "benchmark.json"

    def _train(self, stage: Stage) -> None:
        run_dir, least = self._options.run_dir, self._options.least
        checkpoint.mend(run_dir)
        if files.wall_seconds(run_dir) and not self._has_checkpoint():
            raise UserError(f"{run_dir} has lost its checkpoints: copy them back, or another --dir starts anew")
        if self._training_left >= least:
            span = min(self._training_left, self._left)
            if span < least and not self._fresh:
                return
            stage.tries += 1
            if not self._train_for(span, stage) and self._training_left >= least:
                return
        if not stage.outcome and not self._stop.requested:
            there = self._has_checkpoint()
            _ended(stage, DONE if there else FAILED, f"calls: {stage.tries}" if there else "no time was left for it")

    def _train_for(self, span: float, stage: Stage) -> bool:
        """Begin the run, or go on with it, for so many seconds; whether it came to an end of its own, good or bad."""
        run_dir, left = self._options.run_dir, self._training_left
        free = free_arguments(self._options, files.wall_seconds(run_dir), left, span)
        words = processes.how_to_train(run_dir, arguments_of(self._options), free)
        end = self._process(stage, "train", processes.package_command(["train", *words]), span)
        self._note_machine()
        line = files.last_line(self._log("train"))
        if end == "failed" and " is complete (" not in line:
            _ended(stage, FAILED, line)
        elif end == "done" and line.startswith("stopped at step"):
            _ended(stage, FAILED, "another program stopped it")
        return end in ("done", "failed")

    def _weights(self, stage: Stage) -> None:
        from gravitar_dqn import trained

        if self._needs_checkpoint(stage):
            path = self._options.dir / "weights" / f"{self._options.preset}.safetensors"
            began = monotonic()
            try:
                trained.write(trained.from_run(self._options.run_dir), path)
                _ended(stage, DONE, f"weights/{path.name}")
            except (UserError, OSError) as error:
                _ended(stage, FAILED, str(error))
            stage.seconds += monotonic() - began

    def _evaluation(self, stage: Stage) -> None:
        if not self._needs_checkpoint(stage):
            return
        words = ["eval", str(self._options.run_dir), f"--episodes={self._options.games}"]
        words += [f"--snapshots={self._options.snapshots}", f"--device={self._options.device}"]
        self._simple("evaluation", stage, processes.package_command(words))
        if stage.outcome == FAILED and NO_SNAPSHOTS in stage.said:  # a run that ended early: it was evaluated
            _ended(stage, DONE, f"{self._options.run_dir.name}/eval.json; no snapshots")
        elif stage.outcome == DONE:
            stage.said = f"{self._options.run_dir.name}/eval.json"
            newest = (checkpoint.folder(self._options.run_dir) / "latest").resolve()
            for path in newest.parent.glob("step_*.pt"):  # the others have served, and are most of what travels
                if path != newest:
                    path.unlink()

    def _curves(self, stage: Stage) -> None:
        if not self._needs_checkpoint(stage):
            return
        words = ["plot", str(self._options.run_dir), f"--out={self._options.dir / 'curves.png'}"]
        published = "gravitar" in self._game().lower()
        words += ["--published"] * published
        self._simple("curves", stage, processes.package_command(words))
        if stage.outcome == DONE:
            stage.said = "curves.png"

    # ------------------------------------------------------------ what they share

    def _simple(
        self, name: str, stage: Stage, command: Sequence[str], *, cwd: Path | None = None, before_training: bool = False
    ) -> None:
        """A stage that is a process: run it, unless it would not fit into this call."""
        fresh, seconds = self._fresh, self._left
        if not fresh and seconds < self._options.needed(name):
            return None
        if before_training:
            seconds = min(seconds, self._training_left - self._options.least)
            if seconds <= 0:
                return _ended(stage, SKIPPED, "no time was left for it")
        if stage.tries >= TRIES:
            return _ended(stage, CUT_SHORT, f"{stage.tries} calls were too short for it")
        stage.tries += 1
        end = self._process(stage, name, command, seconds, cwd)
        line = files.last_line(self._log(name))
        if end == "stopped":
            stage.tries -= 1
        elif end == "cut short" and not before_training and not fresh:
            return None  # the next call has more time for it
        else:
            _ended(stage, end, f"after {stage.seconds:.0f} s" if end == CUT_SHORT else line)
        return None

    def _process(self, stage: Stage, name: str, command: Sequence[str], seconds: float, cwd: Path | None = None) -> End:
        """Run a process for at most so many seconds, then interrupt it, which lets it save; what became of it."""
        print(f"{name}: started, for at most {seconds / 60:.1f} minutes", flush=True)
        self._fresh = False
        self.note()  # that it was tried, for whoever comes after a kill
        began, before = monotonic(), stage.seconds
        process = processes.start(command, self._log(name), cwd=cwd, dies_with_us=True)
        interrupted, stopped = False, False
        try:
            while process.poll() is None:
                now = monotonic()
                stage.seconds = before + now - began
                if not interrupted and (self._stop.requested or now >= began + seconds):
                    process.send_signal(signal.SIGINT)
                    interrupted, stopped = True, self._stop.requested
                if now >= self._last:
                    _kill(process)
                if now >= self._noted + NOTE_SECONDS:
                    self.note()
                sleep(0.02)
        finally:
            _kill(process)
            stage.seconds = before + monotonic() - began
        if interrupted and (process.returncode or name == "train"):  # another may have ended at that very moment
            return "stopped" if stopped else "cut short"
        return "done" if process.returncode == 0 else "failed"

    def _log(self, name: str) -> Path:
        return self._options.dir / "logs" / f"{name}.log"

    def _has_checkpoint(self) -> bool:
        return (checkpoint.folder(self._options.run_dir) / "latest").exists()

    def _needs_checkpoint(self, stage: Stage) -> bool:
        """Whether there is one; otherwise the stage is skipped."""
        checkpoint.mend(self._options.run_dir)
        if not self._has_checkpoint():
            _ended(stage, SKIPPED, "the run has no checkpoint")
        return not stage.outcome

    def _game(self) -> str:
        record = files.read_json(self._options.run_dir / "config.json")
        return str(record["config"]["env"]["id"])

    def _note_machine(self) -> None:
        with contextlib.suppress(UserError):  # it ended before it wrote one
            record = files.read_json(self._options.run_dir / "config.json")
            for name, seen in (("device", self._state.machines), ("commit", self._state.commits)):
                if record.get(name) and record[name] not in seen:
                    seen.append(record[name])


def _ended(stage: Stage, outcome: str, said: str) -> None:
    stage.outcome, stage.said = outcome, said or "it printed nothing"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs, and those it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
