"""A campaign: the GPU tests, the benchmark, then the longest run that the rest of the time allows, and its results.

It is done in calls that are shorter than a device is lent for. Each goes on where the one before it ended, by itself
or by a kill. A stage is a command in a process of its own; campaign.csv has a row for each that ended, and for each
call's piece of the training. A stage that fails is noted, and the next one follows.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, sleep

import tyro

from gravitar_dqn import files, processes, sweep_plan
from gravitar_dqn.config import RunConfig
from gravitar_dqn.errors import NotFinite, NotSaved, UserError
from gravitar_dqn.presets import get_preset
from gravitar_dqn.run_dir import claimed, how_to_train
from gravitar_dqn.serialization import flatten, to_dict
from gravitar_dqn.sweep_plan import as_options, for_snapshots, label, read_settings
from gravitar_dqn.telemetry import CsvLog

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "stage outcome seconds global_step said".split()
STAGES = ("tests", "benchmark", "train", "weights", "evaluation", "curves")
USUAL = {"tests": 180.0, "benchmark": 180.0, "weights": 10.0, "curves": 15.0}  # seconds
TRIES = 3  # calls that may begin a stage other than training
DONE, FAILED, CUT_SHORT, SKIPPED, PIECE = "done", "failed", "cut short", "skipped", "a piece"
BEGUN = "begun"
# What the campaign sets itself. The rest of the run can be changed with --settings.
OWN = sweep_plan.OWN | {
    "preset": "the preset comes first",
    "seed": "--seed sets it",
    "device": "--device sets it",
    **dict.fromkeys(("checkpoint_minutes", "keep_checkpoints"), "it follows from --minutes"),
}
QUICK = {  # settings that are at most so large, where the preset has them
    "env.num_envs": 4,
    "log_seconds": 0.2,
    "agent.learning_starts": 200,
    "agent.buffer_size": 5_000,
    "agent.batch_size": 32,
    "agent.num_steps": 16,
    "rnd.init_steps": 20,
    "tasks.replay_length": 200,
    "tasks.num_windows": 2,
}


@dataclass(frozen=True)
class CampaignConfig:
    """What a campaign is asked for."""

    preset: tyro.conf.Positional[str] = "gravitar-ram"
    """What is trained."""
    dir: Path = Path("runs/campaign")
    """The campaign's folder; it may be moved to another machine between two calls."""
    minutes: float = field(default=45.0, metadata={"low": 0.1, "high": 1e6})
    """Time of the whole campaign, all calls together. Only an evaluation that is slow may exceed it."""
    piece_minutes: float = field(default=9.0, metadata={"low": 0.25, "high": 1e6})
    """This call ends before so much time has passed; the next one goes on."""
    seed: int = 742
    """Of the run."""
    settings: str = ""
    """Settings of the run, "env.num-envs=256 agent.batch-size=1024"."""
    quick: bool = False
    """Everything small, to try a campaign on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.dir / f"{self.preset}__{self.seed}"

    @property
    def margin(self) -> float:
        """Seconds at the end of a call in which nothing is done but saving."""
        return min(30.0, 6 * self.piece_minutes)

    @property
    def reserve(self) -> float:
        """Seconds that are kept for what follows the training. They fit into a call."""
        return min(9 * self.minutes, 48 * self.piece_minutes)

    @property
    def least(self) -> float:
        """Seconds of the shortest training that is worth its start."""
        return min(60.0, 12 * self.piece_minutes, 6 * self.minutes)

    def needed(self, stage: str) -> float:
        """Seconds that a stage probably takes; only a call that has just begun starts it with fewer left."""
        return (USUAL | {"train": self.least, "evaluation": self.reserve})[stage]


def arguments_of(options: CampaignConfig) -> list[str]:
    """Arguments of `train` for a new run, without its folder and what changes from call to call."""
    preset = get_preset(options.preset)
    given = {"dashboard": "off", "video_every": "0", "total_steps": str(10**12)}  # the time ends the run
    if options.quick:
        values = flatten(to_dict(preset))
        given |= {name: str(min(values[name], small)) for name, small in QUICK.items() if name in values}
    given |= read_settings(options.settings, "--settings", OWN, "a campaign")
    return [options.preset, *as_options(preset, given), f"--seed={options.seed}"]


def run(options: CampaignConfig, read: Callable[[Sequence[str]], RunConfig]) -> int:
    """Do what fits into this call. 1 when all is done and a stage did not end well, else 0.

    `read` returns the configuration that arguments of `train` stand for; UserError when they cannot be.
    """
    began = monotonic()
    config = read([*arguments_of(options), f"--device={options.device}"])
    from gravitar_dqn.training import check_machine

    check_machine(config)
    asked = {name: value for name, value in asdict(options).items() if name not in ("dir", "piece_minutes")}
    asked["settings"] = label(read_settings(options.settings, "--settings", OWN, "a campaign"))
    with claimed(options.dir / "campaign.json", asked, "a campaign"), processes.Stop() as stop:
        campaign = Campaign(options, config, began, stop)
        try:
            campaign.work()
        finally:
            (options.dir / "table.md").write_text(text := campaign.table())
    if (name := campaign.next) is None:
        bad = [name for name in STAGES if campaign.outcome(name) in (FAILED, CUT_SHORT)]
        print(f"{text}all stages have ended, {len(bad)} of them badly")
        return int(bool(bad))
    print(f"{'stopped' if stop.requested else 'end of this piece'}; next: {name}")
    print(f"the same command goes on: {processes.command_line(sys.argv[1:])}")
    return stop.exit_code


class Campaign:
    """One call's work on a campaign."""

    def __init__(self, options: CampaignConfig, config: RunConfig, began: float, stop: processes.Stop) -> None:
        self._options, self._config, self._stop = options, config, stop
        self._path = options.dir / "campaign.csv"
        self._log = CsvLog(self._path, COLUMNS, last_step=sys.maxsize)
        self._end = began + 60 * options.piece_minutes - options.margin  # what still runs then is asked to end,
        self._last = self._end + options.margin / 3  # and then made to; this program ends in the rest
        self._fresh = True  # nothing was started in this call
        from gravitar_dqn import checkpoint

        checkpoint.mend(options.run_dir)  # the folder may have been copied
        (options.dir / "logs").mkdir(exist_ok=True)

    # ------------------------------------------------------------ what is done, and the time it took

    def _rows(self, name: str) -> list[dict[str, str]]:
        return [row for row in files.read_rows(self._path) if row["stage"] == name]

    def outcome(self, name: str) -> str:
        """Of a stage that has ended; else empty."""
        return next((row["outcome"] for row in self._rows(name) if row["outcome"] != PIECE), "")

    @property
    def next(self) -> str | None:
        """The stage that has not ended yet; None when all have."""
        return next((name for name in STAGES if not self.outcome(name)), None)

    def _seconds(self, name: str) -> float:
        """That a stage took so far. Of training that was killed metrics.csv tells."""
        noted = sum(float(row["seconds"]) for row in self._rows(name))
        return max(noted, files.wall_seconds(self._options.run_dir)) if name == "train" else noted

    def _note(self, name: str, outcome: str, seconds: float, said: str) -> None:
        rows = files.read_rows(self._options.run_dir / "metrics.csv")
        step = rows[-1]["global_step"] if rows else 0
        said = said.replace(f"{self._options.dir.resolve()}/", "").replace(f"{self._options.dir}/", "")
        self._log.add([name, outcome, f"{seconds:.1f}", step, said or "it printed nothing"])
        self._log.flush()
        if outcome not in (PIECE, self.outcome(name)):
            raise UserError(f"{self._path} cannot be written: is the disk full?")
        if outcome != PIECE:
            print(f"{name}: {outcome} ({said})", flush=True)

    # ------------------------------------------------------------ stages

    def work(self) -> None:
        """Stage after stage, until the call's time is over."""
        while (name := self.next) is not None and not self._stop.requested:
            if not self._fresh and self._end - monotonic() < self._options.needed(name):
                return  # the next call has more time for it
            late = name in STAGES[3:] and not self._has_checkpoint()
            command = "the run has no checkpoint" if late else getattr(self, f"_{name}")()
            if [row["said"] for row in self._rows(name)].count(BEGUN) == TRIES:
                self._note(name, CUT_SHORT, 0.0, f"begun by {TRIES} calls, none of which ended it")
            elif isinstance(command, str):
                self._note(name, SKIPPED, 0.0, command)
            elif name == "train":
                self._train_on(command)
            else:
                self._process(name, command, 12 * self._options.minutes)  # at most a fifth of the campaign

    def _tests(self) -> list[str] | str:
        """The stage's command, or why it is skipped."""
        from gravitar_dqn.execution import choose_device

        if not (ROOT / "tests" / "test_gpu.py").exists():
            return "this is not a clone of the repository"
        if choose_device(self._options.device).type != "cuda":
            return "no CUDA device"
        if importlib.util.find_spec("pytest") is None:
            return "pytest is not installed"
        words = ["-q", "-p", "no:cacheprovider", "-m", "gpu", f"--rootdir={ROOT}", f"-c={ROOT / 'pyproject.toml'}"]
        return [sys.executable, "-m", "pytest", *words, str(ROOT / "tests")]

    def _benchmark(self) -> list[str]:
        words = ["bench", "--quick", f"--device={self._options.device}"]
        words += [f"--json={self._options.dir / 'benchmark.json'}"]
        if self._options.quick:
            words += ["--no-peers", "--rounds=1", "--seconds=0.1", "--num-envs=16", "--sizes", "1000"]
        return processes.package_command(words)

    def _train(self) -> list[str]:
        trained, left = self._seconds("train"), self._training_left()
        probable = 0.9 * (trained + left) / 60  # minutes: starting and saving take time too
        free = {"total_minutes": f"{(trained + left) / 60:.4f}", "device": self._options.device}
        free |= for_snapshots(2 if self._options.quick else 5, probable)
        if trained + self._end - monotonic() < 60 * probable * (1 - sweep_plan.LAST_PART):
            free["keep_checkpoints"] = "2"  # nothing of the last part yet: what travels stays small
        options = list(as_options(get_preset(self._options.preset), free))
        words = how_to_train(self._options.run_dir, arguments_of(self._options), options)
        return processes.package_command(["train", *words])

    def _training_left(self) -> float:
        """Seconds of the campaign that are for training."""
        used = sum(self._seconds(name) for name in STAGES)
        return 60 * self._options.minutes - used - self._options.reserve

    def _train_on(self, command: Sequence[str]) -> None:
        """Begin the run, or go on with it, until its time or the call's is over."""
        if self._training_left() >= self._options.least:
            self._process("train", command, self._training_left())
        if not self.outcome("train") and self._training_left() < self._options.least:
            self._note("train", DONE if self._has_checkpoint() else FAILED, 0.0, self._how_far())

    def _weights(self) -> list[str]:
        path = self._options.dir / "weights" / f"{self._options.preset}.safetensors"
        return [sys.executable, "-m", "gravitar_dqn.trained", str(self._options.run_dir), str(path)]

    def _evaluation(self) -> list[str]:
        games = ["--episodes=4", "--snapshots=2"] if self._options.quick else ["--episodes=100", "--snapshots=5"]
        words = ["eval", str(self._options.run_dir), f"--device={self._options.device}", *games]
        return processes.package_command(words)

    def _curves(self) -> list[str]:
        published = ["--published"] * ("gravitar" in self._config.env.id.lower())
        out = f"--out={self._options.dir / 'curves.png'}"
        return processes.package_command(["plot", str(self._options.run_dir), out, *published])

    def _has_checkpoint(self) -> bool:
        return (self._options.run_dir / "checkpoints" / "latest").exists()

    # ------------------------------------------------------------ processes

    def _log_of(self, name: str) -> Path:
        return self._options.dir / "logs" / f"{name}.log"

    def _process(self, name: str, command: Sequence[str], limit: float) -> None:
        """Run a stage's process for at most `limit` seconds and the call's time, then interrupt it; note how it ended.

        What was cut short counts as ended, but for training, and where another call has more time for it.
        """
        began, fresh, self._fresh = monotonic(), self._fresh, False
        until = min(began + limit, self._end)
        print(f"{name}: started, for at most {(until - began) / 60:.1f} minutes", flush=True)
        if name != "train":
            self._note(name, PIECE, 0.0, BEGUN)  # for the calls after a kill
        process = processes.start(command, self._log_of(name), dies_with_us=True)
        interrupted = False
        try:
            while process.poll() is None:
                if not interrupted and (self._stop.requested or monotonic() >= until):
                    process.send_signal(signal.SIGINT)
                    interrupted = True
                if monotonic() >= min(self._last, until + self._options.margin):
                    break
                sleep(0.02)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and those that it started
            process.wait()
        seconds, line = monotonic() - began, files.last_line(self._log_of(name))
        if name == "evaluation":  # its last line is of the snapshots
            line = next((row for row in files.last_output(self._log_of(name)).split("\n") if "mean" in row[:4]), line)
        if process.returncode == 0:
            self._note(name, DONE, seconds, self._how_far() if name == "train" else line)
        elif name == "train":
            # Any other exit code may be that of an interruption, which can meet Python at a bad moment.
            stopped = interrupted and process.returncode not in (UserError.exit_code, NotFinite.exit_code)
            ended = PIECE if stopped else DONE if " is complete (" in line else FAILED
            said = line if ended == FAILED or process.returncode == NotSaved.exit_code else self._how_far()
            self._note(name, ended, seconds, said)
        elif not interrupted:
            self._note(name, FAILED, seconds, line)
        else:
            waits = self._stop.requested or (not fresh and until == self._end)
            self._note(name, PIECE if waits else CUT_SHORT, seconds, f"after {seconds:.0f} s")
        if name == "evaluation" and self.outcome(name) == DONE:
            self._remove_snapshots()

    def _remove_snapshots(self) -> None:
        """They have served; what travels stays small. Not where the newest is damaged and another one was played."""
        from gravitar_dqn import checkpoint

        newest = (self._options.run_dir / "checkpoints" / "latest").resolve()
        played, _ = next(checkpoint.whole(self._options.run_dir, []))
        for path in {*newest.parent.glob("step_*.pt")} - {newest} if played.name == newest.name else ():
            path.unlink()

    # ------------------------------------------------------------ results

    def _how_far(self) -> str:
        """What the run did so far."""
        rows = files.read_rows(self._options.run_dir / "metrics.csv")
        if not rows:
            return "no time was left for it"
        record = files.read_json(self._options.run_dir / "config.json")
        seconds, steps = float(rows[-1]["wall_seconds"]), int(rows[-1]["global_step"])
        done = f"{steps:,} steps, {int(rows[-1]['frames']):,} frames, {steps / max(seconds, 1e-9):,.0f} steps/s"
        return f"{done} on {record['device']}, commit {record['commit'] or 'unknown'}"

    def table(self) -> str:
        """All that is known so far, as Markdown."""
        options, lines = self._options, []
        for name in STAGES:
            outcome, rows = self.outcome(name), self._rows(name)
            said = " ".join((rows[-1]["said"] if rows else "").split()).replace("|", r"\|")
            more = f"; more in logs/{name}.log" * (outcome in (FAILED, CUT_SHORT))
            minutes = self._seconds(name) / 60
            lines.append(f"| {name} | {outcome or 'not yet'} | {minutes:.1f} | {said[:160]}{more} |")
        title = f"# campaign {options.preset} --minutes {options.minutes:g} --seed {options.seed}"
        title += f' --settings "{options.settings}"' * bool(options.settings) + " --quick" * options.quick
        lines = [title, "", "| stage | outcome | minutes | |", "|---|---|---|---|", *lines]
        for name in ("evaluation", "benchmark"):
            if self._rows(name) and (output := files.last_output(self._log_of(name))):
                lines += ["", f"## {name}", "", "```", output, "```"]
        return "\n".join(lines) + "\n"
