"""A sweep: the runs of `sweep_plan`, each a process of its own, evaluated as it ends; a row of sweep.csv for each."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np

from gravitar_dqn.errors import UserError
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.files import last_line, read_json, read_rows, wall_seconds
from gravitar_dqn.run.folder import claimed
from gravitar_dqn.runtime.processes import Stop, command_line, package_command, start
from gravitar_dqn.tools.sweep_plan import Job, SweepConfig

log = logging.getLogger(__name__)

COLUMNS = (
    "preset variant seed global_step frames minutes sps train_mean mean std median iqm iqm_low iqm_high run_dir"
).split()
EPSILON = 0.001
LAST_GAMES = 100  # of training, in the column train_mean


def split_cores(cores: Sequence[int], parts: int) -> list[list[int]]:
    """`parts` disjoint sets of equal size, so that runs can be compared; what is left over stays idle."""
    size = len(cores) // parts
    if not size:
        raise UserError(f"--parallel is {parts}, but {len(cores)} cores are available: that is the most it can be")
    return [list(cores[i * size : (i + 1) * size]) for i in range(parts)]


def split_devices(device: str, parts: int) -> list[str | None]:
    """What each of `parts` runs finds in CUDA_VISIBLE_DEVICES: a GPU of its own, as far as there are; None: no matter.

    A device that was named, as in cuda:1, is every run's.
    """
    import torch

    if device not in ("auto", "cuda") or not (count := torch.cuda.device_count()):
        return [None] * parts
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(count))
    return [visible.split(",")[i % count] for i in range(parts)]


def bind(cores: Iterable[int]) -> None:
    """Bind the calling thread, and the processes that it will start, to these cores where the system can do that."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def run(options: SweepConfig, jobs: Sequence[Job], core_sets: Sequence[Sequence[int]]) -> int:
    """Train and evaluate what is not in sweep.csv yet, and print a table of all. 1 when a run failed, else 0."""
    from gravitar_dqn.training import check_machine

    for job in {job.key[:2]: job for job in jobs}.values():
        try:
            check_machine(job.config)
        except UserError as error:
            raise UserError(f"{job.preset} {job.variant}: {error}") from None
    with claimed(options.folder / "sweep.json", options.fixed, "a sweep"):
        sweep = Sweep(options, jobs)
        with Stop() as stop:
            threads = [threading.Thread(target=sweep.work, args=(i, cores)) for i, cores in enumerate(core_sets)]
            for thread in threads:
                thread.start()
            sweep.follow(threads, stop)
        if sweep.error is not None:
            raise sweep.error
        print(table(read_rows(sweep.path), jobs))
        again = command_line(sys.argv[1:])
        if sweep.stopped:
            log.info(f"stopped; the same command goes on: {again}")
            return stop.exit_code
        if sweep.left:
            log.info(f"{sweep.left} runs were not started, they would not end in time; again: {again}")
        return int(sweep.failures > 0)


class Sweep:
    """Runs that are shared out to threads, one for each set of cores, which start processes and wait for them."""

    def __init__(self, options: SweepConfig, jobs: Sequence[Job]) -> None:
        self.path = options.folder / "sweep.csv"
        done = {(row["preset"], row["variant"], row["seed"]) for row in read_rows(self.path)}
        self._options = options
        self._log = CsvLog(self.path, COLUMNS, last_step=sys.maxsize)
        self._pending = [job for job in jobs if job.key not in done]
        self._number, self._total = len(jobs) - len(self._pending), len(jobs)
        self._lock = threading.Lock()  # of all that follows
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._began = monotonic()
        self._overheads: list[float] = []  # seconds that each run took beside its training
        self.failures = 0
        self.stopped = False
        self.error: BaseException | None = None
        minutes = len(self._pending) * options.minutes / options.parallel
        print(f"{self._total} runs, {self._number} of them done before: {options.folder}", flush=True)
        print(f"{len(self._pending)} to train, at most {minutes:g} minutes and their evaluation", flush=True)

    @property
    def left(self) -> int:
        """Runs that were not started."""
        return len(self._pending)

    def follow(self, threads: Sequence[threading.Thread], stop: Any) -> None:
        """Wait for the threads. The first Ctrl-C interrupts the processes, which save; the second kills them."""
        try:
            while any(thread.is_alive() for thread in threads):
                if (stop.requested or self.error is not None) and not self.stopped:
                    if stop.requested:
                        log.info("stopping: the runs save what they have")
                    self._interrupt(signal.SIGINT)
                sleep(0.05)
        except KeyboardInterrupt:
            self._interrupt(signal.SIGKILL)
            raise
        finally:
            for thread in threads:
                thread.join()

    def _interrupt(self, number: int) -> None:
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.send_signal(number)

    def work(self, number: int, cores: Sequence[int]) -> None:
        """Be worker `number`: train and evaluate runs on these cores until none is left. Errors are kept in `error`."""
        try:
            bind(cores)
            while (job := self._next()) is not None:
                device = split_devices(job.config.device, self._options.parallel)[number]
                env = {"OMP_NUM_THREADS": str(len(cores))}
                self._do(job, env if device is None else {**env, "CUDA_VISIBLE_DEVICES": device})
        except BaseException as error:
            self.error = error

    def _next(self) -> Job | None:
        with self._lock:
            if self.stopped or not self._pending:
                return None
            job = next((job for job in self._pending if self._fits(job)), None)
            if job is None:
                return None
            self._pending.remove(job)
            self._number += 1
            print(f"[{self._number}/{self._total}] {job.title}: started", flush=True)
            return job

    def _fits(self, job: Job) -> bool:
        """Whether a run would end within the budget."""
        overhead = max(self._overheads, default=6 * self._options.minutes)  # guessed until one has ended
        needed = 60 * self._options.minutes - wall_seconds(job.run_dir) + overhead
        budget = 60 * self._options.budget_minutes
        return not budget or monotonic() - self._began + needed <= budget

    def _do(self, job: Job, env: Mapping[str, str]) -> None:
        began, trained = monotonic(), wall_seconds(job.run_dir)
        log = job.run_dir.with_name(job.run_dir.name + ".log")
        # A sweep that was killed may have left a complete run without its row: training then ends at once.
        words = [*job.arguments, "--run-dir", str(job.run_dir), "--resume", "auto"]
        if not self._process(["train", *words], log, env):
            return self._failed(job, log)
        games = [f"--episodes={self._options.episodes}", f"--epsilon={EPSILON}", f"--device={job.config.device}"]
        if not self._process(["eval", str(job.run_dir), *games], log, env):
            return self._failed(job, log)
        try:
            row = make_row(job)
        except UserError as error:
            return self._failed(job, log, str(error))
        with self._lock:
            self._log.add([row[name] for name in COLUMNS])
            self._log.flush()
            self._overheads.append(monotonic() - began - (wall_seconds(job.run_dir) - trained))
        steps, minutes = row["global_step"], row["minutes"]
        print(f"{job.title}: mean score {row['mean']:.1f}, {steps} steps in {minutes:.1f} minutes", flush=True)
        return None

    def _failed(self, job: Job, log_path: Path, reason: str = "") -> None:
        """Tell of a run that failed, unless it was stopped with the sweep."""
        if not self.stopped:
            log.warning(
                f"{job.title} failed ({reason or last_line(log_path) or 'it printed nothing'}); more in {log_path}"
            )
            with self._lock:
                self.failures += 1

    def _process(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> bool:
        """Run a command of the package to its end; whether it succeeded. What it prints is added to `log`."""
        with self._lock:
            if self.stopped:
                return False
            process = start(package_command(words), log, env=env)
            self._processes.add(process)
        process.wait()
        with self._lock:
            self._processes.remove(process)
        return process.returncode == 0


def make_row(job: Job) -> dict[str, Any]:
    """The row of sweep.csv for a run that was trained and evaluated."""
    result = read_json(job.run_dir / "eval.json")
    metrics = read_rows(job.run_dir / "metrics.csv")
    if not metrics:
        raise UserError("its metrics.csv has no row")
    last = metrics[-1]
    seconds, steps = float(last["wall_seconds"]), int(last["global_step"])
    scores = [float(row["episodic_return"]) for row in read_rows(job.run_dir / "episodes.csv")[-LAST_GAMES:]]
    return {
        "preset": job.preset,
        "variant": job.variant,
        "seed": job.seed,
        "global_step": steps,
        "frames": last["frames"],
        "minutes": round(seconds / 60, 3),
        "sps": round(steps / max(seconds, 1e-9), 1),
        "train_mean": f"{np.mean(scores):.6g}" if scores else "",
        **{name: round(result[name], 3) for name in ("mean", "std", "median", "iqm")},
        "iqm_low": round(result["iqm_ci95"][0], 3),
        "iqm_high": round(result["iqm_ci95"][1], 3),
        "run_dir": job.run_dir.name,  # in the sweep's folder, wherever that is taken
    }


def table(rows: Iterable[Mapping[str, str]], jobs: Sequence[Job]) -> str:
    """A line for each preset and variant, in the order of `jobs`: scores over its seeds."""
    found = {(row["preset"], row["variant"], row["seed"]): row for row in rows}
    names = list(dict.fromkeys(job.key[:2] for job in jobs))
    width = max(len(" ".join(name)) for name in names)
    lines = [f"{'':{width}}  seeds  mean of means  lowest to highest          steps"]
    for name in names:
        done = [found[job.key] for job in jobs if job.key[:2] == name and job.key in found]
        means = [float(row["mean"]) for row in done]
        steps = [int(row["global_step"]) for row in done]
        scores = f"{np.mean(means):13.1f}  {f'{min(means):.1f} to {max(means):.1f}':>17}" if means else ""
        lines.append(
            f"{' '.join(name):{width}}  {len(done):5}  {scores}{f'  {np.mean(steps):13,.0f}' if steps else ''}"
        )
    return "\n".join(lines)
