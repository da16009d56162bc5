"""A sweep: presets, variants of them and seeds, each a run with a folder, a process and a row in sweep.csv of its own.

`plan` reads what is asked for as a list of jobs, without torch; `run` trains and evaluates each of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import monotonic, sleep
from typing import Any

import tyro

from gravitar_dqn.config import RunConfig, bounded, check_bounds, flatten, to_dict
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import get_preset
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.files import last_line, last_row, read_json, read_rows, wall_seconds
from gravitar_dqn.run.folder import claimed
from gravitar_dqn.runtime.processes import Stop, command_line, package_command, start

log = logging.getLogger(__name__)

BASE = "base"
# What the sweep sets itself. The rest of a run can be changed by a variant.
OWN = {
    "preset": "the presets come first",
    "seed": "--seeds sets it",
    "total_minutes": "--minutes sets it",
    "run_dir": "--dir sets it",
    "resume": "the same command again goes on",
    "profile": "profile a single run with train",
    "threads": "--parallel sets it",
}
COLUMNS = (
    "preset variant seed global_step frames minutes sps train_mean mean std median iqm iqm_low iqm_high run_dir"
).split()
EPSILON = 0.001
LAST_GAMES = 100  # of training, in the column train_mean


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is asked for."""

    presets: tyro.conf.Positional[tuple[str, ...]]
    """Presets to train, one or more; they come first."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Every preset and variant is trained once with each."""
    variants: tuple[str, ...] = ()
    """Settings to change together against the preset, "agent.gamma=0.99 agent.n-step=3"; each text is a variant."""
    settings: str = ""
    """Settings for all runs, "env.num-envs=64 env.id=ALE/Breakout-v5"."""
    base: bool = True
    """Also train each preset without a variant."""
    minutes: float = bounded(15.0, low=0.001, high=1e6)
    """Training time of each run; one that reaches its other limits (total-steps) ends earlier."""
    budget_minutes: float = bounded(0.0, high=1e6)
    """No run is started that would not end in this time, counted from now; 0: no limit."""
    parallel: int = bounded(1, low=1, high=1024)
    """Runs side by side, each bound to its share of the cores where the system can do that, and to a GPU of its own
    where there is one for each."""
    episodes: int = bounded(100, low=1, high=1e6)
    """Games of each evaluation."""
    dir: Path | None = None
    """The sweep's folder; by default runs/sweeps/<presets>."""

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.dir or Path("runs") / "sweeps" / shortened("_".join(dict.fromkeys(self.presets)))

    @property
    def fixed(self) -> dict[str, Any]:
        """What scores depend on. Presets, variants and seeds may be added later, and the budget is of the day."""
        settings = label(read_settings(self.settings, "--settings"))
        return {"settings": settings, "minutes": self.minutes, "parallel": self.parallel, "episodes": self.episodes}


@dataclass(frozen=True)
class Job:
    """A run of a sweep."""

    preset: str
    variant: str  # what it changes, or BASE
    arguments: tuple[str, ...]  # of train, without the run's folder
    config: RunConfig
    run_dir: Path

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the others, as in sweep.csv."""
        return self.preset, self.variant, str(self.config.seed)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.preset} {self.variant} seed {self.config.seed}"


def plan(options: SweepConfig, threads: int, read: Callable[[Sequence[str]], RunConfig]) -> list[Job]:
    """All runs of a sweep, in the order in which they are started: all variants of a seed before the next seed.

    A budget that ends early then leaves whole comparisons.

    Args:
        options: the sweep's.
        threads: cores that each run has.
        read: the configuration that these arguments of `train` stand for; UserError when they cannot be.

    Returns:
        The runs; UserError for whatever cannot be run.
    """
    check_bounds(options, "--")
    if not options.presets:
        raise UserError("no preset: name one or more first, sweep gravitar ...")
    if not options.seeds:
        raise UserError("--seeds names no seed")
    shared = {"dashboard": "off", "video_every": "0", "env.num_threads": str(threads)}
    shared |= read_settings(options.settings, "--settings") | {"total_minutes": f"{options.minutes:g}"}
    changes = [read_settings(text, "--variants") for text in options.variants]
    if not all(changes):
        raise UserError("--variants has an empty text: a variant is setting=value; the base runs unless --no-base")
    variants: dict[str, dict[str, str]] = {BASE: {}} if options.base else {}
    variants |= {label(changed): changed for changed in changes}
    if not variants:
        raise UserError("--no-base without --variants leaves nothing to run")
    runs = []
    for preset in dict.fromkeys(options.presets):
        for variant, changed in variants.items():
            arguments = (preset, *as_options(get_preset(preset), shared | changed))
            try:
                runs.append((preset, variant, arguments, read(arguments)))
            except UserError as error:
                raise UserError(f"{preset} {variant}: {error}") from None
    jobs = []
    for seed in dict.fromkeys(options.seeds):
        check_bounds(RunConfig(seed=seed))
        for preset, variant, arguments, config in runs:
            run_dir = options.folder / shortened(f"{preset}__{variant}__{seed}")
            jobs.append(Job(preset, variant, (*arguments, f"--seed={seed}"), replace(config, seed=seed), run_dir))
    return jobs


def read_settings(text: str, option: str) -> dict[str, str]:
    """ "agent.n-step=1 seed=2" by dotted names; UserError for what is no setting, or the sweep's own."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r} cannot be read: {error}") from None
    settings = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise UserError(f"{option} {text!r}: {word!r} is not of the form setting=value")
        if name in OWN:
            raise UserError(f"{option} {text!r}: {name} is not for a sweep to change, {OWN[name]}")
        settings[name] = value
    return settings


def label(settings: Mapping[str, str]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{name.replace('_', '-')}={value}" for name, value in settings.items())


def as_options(preset: RunConfig, settings: Mapping[str, str]) -> Iterator[str]:
    """Settings by dotted names as options of `train`, which has switches instead of true and false."""
    known = flatten(to_dict(preset))
    for name, value in settings.items():
        part, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(known.get(name), bool) and value.lower() in ("true", "false"):
            yield f"--{part}{dot}{'' if value.lower() == 'true' else 'no-'}{last}"
        else:
            yield f"--{part}{dot}{last}={value}"


def shortened(name: str) -> str:
    """A name that every file system takes, and that no other name is changed to."""
    plain = re.sub(r"[^\w.=+-]+", "_", name)
    if plain == name.replace(" ", "_") and len(plain) <= 120:
        return plain
    return f"{plain[:110]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------- where it runs


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


# ---------------------------------------------------------------- running it


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
        with Stop() as stop, ThreadPoolExecutor(len(core_sets)) as pool:
            workers = [pool.submit(sweep.work, i, cores) for i, cores in enumerate(core_sets)]
            sweep.follow(workers, stop)
        failures = sum(worker.result() for worker in workers)  # or the error that ended a worker
        print(table(finished(sweep.path), jobs))
        again = command_line(sys.argv[1:])
        if sweep.signal:
            log.info(f"stopped; the same command goes on: {again}")
            return stop.exit_code
        if sweep.pending:
            log.info(f"{len(sweep.pending)} runs were not started, they would not end in time; again: {again}")
        return int(failures > 0)


class Sweep:
    """Runs that are shared out to threads, one for each set of cores, which start processes and wait for them."""

    def __init__(self, options: SweepConfig, jobs: Sequence[Job]) -> None:
        self.path = options.folder / "sweep.csv"
        done = finished(self.path)
        self.pending = [job for job in jobs if job.key not in done]
        self.signal = 0  # what the processes are sent; not 0: nothing more is started
        self._log = CsvLog(self.path, COLUMNS, last_step=sys.maxsize)
        self._options, self._total = options, len(jobs)
        self._lock = threading.Lock()  # of `pending` and the log
        self._began = monotonic()
        self._overheads: list[float] = []  # seconds that each run took beside its training
        minutes = len(self.pending) * options.minutes / options.parallel
        print(f"{self._total} runs, {self._total - len(self.pending)} of them done before: {options.folder}")
        print(f"{len(self.pending)} to train, at most {minutes:g} minutes and their evaluation", flush=True)

    def follow(self, workers: Sequence[Future[int]], stop: Stop) -> None:
        """Wait for the workers. The first Ctrl-C interrupts the processes, which save; the second kills them.

        An error in a worker interrupts the processes of the others too.
        """
        try:
            while (found := wait(workers, timeout=0.05)).not_done:
                if stop.requested and not self.signal:
                    log.info("stopping: the runs save what they have")
                if stop.requested or any(worker.exception() for worker in found.done):
                    self.signal = signal.SIGINT
        except KeyboardInterrupt:
            self.signal = signal.SIGKILL
            raise

    def work(self, number: int, cores: Sequence[int]) -> int:
        """Be worker `number`: train and evaluate runs on these cores until none is left. How many failed."""
        bind(cores)
        failures = 0
        for job in iter(self._next, None):
            env = {"OMP_NUM_THREADS": str(len(cores))}
            device = split_devices(job.config.device, self._options.parallel)[number]
            if device is not None:
                env["CUDA_VISIBLE_DEVICES"] = device
            log_path = job.run_dir.with_name(job.run_dir.name + ".log")
            try:
                self._do(job, log_path, env)
            except UserError as error:
                if not self.signal:  # it was not stopped with the sweep
                    log.warning(f"{job.title} failed ({error}); more in {log_path}")
                    failures += 1
        return failures

    def _next(self) -> Job | None:
        with self._lock:
            job = next((job for job in self.pending if not self.signal and self._fits(job)), None)
            if job is not None:
                self.pending.remove(job)
                print(f"[{self._total - len(self.pending)}/{self._total}] {job.title}: started", flush=True)
            return job

    def _fits(self, job: Job) -> bool:
        """Whether a run would end within the budget."""
        overhead = max(self._overheads, default=6 * self._options.minutes)  # guessed until one has ended
        needed = 60 * self._options.minutes - wall_seconds(job.run_dir) + overhead
        budget = 60 * self._options.budget_minutes
        return not budget or monotonic() - self._began + needed <= budget

    def _do(self, job: Job, log_path: Path, env: Mapping[str, str]) -> None:
        """Train and evaluate a run, and write its row; UserError when it failed."""
        began, trained = monotonic(), wall_seconds(job.run_dir)
        # A sweep that was killed may have left a complete run without its row: training then ends at once.
        train = ["train", *job.arguments, "--run-dir", str(job.run_dir), "--resume", "auto"]
        games = [f"--episodes={self._options.episodes}", f"--epsilon={EPSILON}", f"--device={job.config.device}"]
        for words in (train, ["eval", str(job.run_dir), *games]):
            if not self._process(words, log_path, env):
                raise UserError(last_line(log_path) or "it printed nothing")
        row = make_row(job)
        with self._lock:
            self._log.add(row.values())
            self._log.flush()
        self._overheads.append(monotonic() - began - (wall_seconds(job.run_dir) - trained))
        steps, minutes = row["global_step"], row["minutes"]
        print(f"{job.title}: mean score {row['mean']:.1f}, {steps} steps in {minutes:.1f} minutes", flush=True)

    def _process(self, words: Sequence[str], log_path: Path, env: Mapping[str, str]) -> bool:
        """Run a command of the package to its end; whether it succeeded. What it prints is added to the log."""
        if self.signal:
            return False
        process, sent = start(package_command(words), log_path, env=env), 0
        while process.poll() is None:
            if sent != self.signal:
                sent = self.signal
                process.send_signal(sent)
            sleep(0.05)
        return process.returncode == 0


# ---------------------------------------------------------------- what came of it


def make_row(job: Job) -> dict[str, Any]:
    """The row of sweep.csv, by COLUMNS, for a run that was trained and evaluated."""
    result, last = read_json(job.run_dir / "eval.json"), last_row(job.run_dir / "metrics.csv")
    if not last:
        raise UserError("its metrics.csv has no row")
    steps, seconds = int(last["global_step"]), float(last["wall_seconds"])
    progress = [steps, last["frames"], round(seconds / 60, 3), round(steps / max(seconds, 1e-9), 1)]
    games = [float(row["episodic_return"]) for row in read_rows(job.run_dir / "episodes.csv")[-LAST_GAMES:]]
    train_mean = f"{fmean(games):.6g}" if games else ""
    scores = [*(result[name] for name in ("mean", "std", "median", "iqm")), *result["iqm_ci95"]]
    # The folder's name alone: it is in the sweep's folder, wherever that is taken.
    values = [*job.key, *progress, train_mean, *(round(score, 3) for score in scores), job.run_dir.name]
    return dict(zip(COLUMNS, values, strict=True))


def finished(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a sweep.csv by the key of their jobs."""
    return {(row["preset"], row["variant"], row["seed"]): row for row in read_rows(path)}


def table(rows: Mapping[tuple[str, str, str], Mapping[str, str]], jobs: Sequence[Job]) -> str:
    """A line for each preset and variant, in the order of `jobs`: scores over its seeds."""
    names = list(dict.fromkeys(job.key[:2] for job in jobs))
    width = max(len(" ".join(name)) for name in names)
    lines = [f"{'':{width}}  seeds  mean of means  lowest to highest          steps"]
    for name in names:
        done = [rows[job.key] for job in jobs if job.key[:2] == name and job.key in rows]
        line = f"{' '.join(name):{width}}  {len(done):5}"
        if done:
            means = [float(row["mean"]) for row in done]
            spread, steps = f"{min(means):.1f} to {max(means):.1f}", fmean(int(row["global_step"]) for row in done)
            line += f"  {fmean(means):13.1f}  {spread:>17}  {steps:13,.0f}"
        lines.append(line)
    return "\n".join(lines)
