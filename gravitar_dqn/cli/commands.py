"""The command line, `gravitar-dqn train | eval | watch | runs | ...`, and scripts/.

Torch and the games are imported only by what needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.cli.arguments import (
    DashboardArguments,
    EvaluateArguments,
    ExportArguments,
    PlayArguments,
    RunsArguments,
    TrainArguments,
    WatchArguments,
    parse,
)
from gravitar_dqn.config import RunConfig, differences, validate
from gravitar_dqn.errors import Interrupted, UserError, did_you_mean
from gravitar_dqn.presets import PRESETS, PRETRAINED, get_preset
from gravitar_dqn.run.files import write_json
from gravitar_dqn.run.folder import check_free, commit, load_run, run_to_resume
from gravitar_dqn.run.logs import forget_unwritten, nobody_reads_stdout, show_log, speaks
from gravitar_dqn.run.status import RUNS, find, find_one, runs_in, standing
from gravitar_dqn.run.status import table as runs_table
from gravitar_dqn.runtime.processes import Stop, torchrun_rank

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gravitar_dqn.evaluation.trained_agent import Trained


def resume_folder(argv: Sequence[str]) -> Path | None:
    """The folder after --resume, needed before the rest can be read: the saved settings are the defaults.

    None for the word auto too: there they are what the rest is compared with.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?")
    found = parser.parse_known_args(argv)[0].resume
    return None if found in (None, "auto") else Path(found)


def parse_train(argv: Sequence[str], prog: str) -> tuple[TrainArguments, RunConfig | None]:
    """The arguments of `train` with valid settings, and the saved ones of the run in the folder after --resume."""
    argv = list(argv)
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else None
    saved_in = resume_folder(argv)
    if saved_in is not None and not saved_in.exists() and (RUNS / saved_in).exists():
        saved_in = RUNS / saved_in  # its name
    saved = load_run(saved_in, to_train=True) if saved_in is not None else None
    default = saved or get_preset(preset or "gravitar")
    if saved is not None and preset not in (None, saved.preset):
        raise UserError(f"{saved_in} was started with the preset {saved.preset}, not {preset}: leave the preset out")
    description = (
        f"Train an agent. {prog} [PRESET] [options]; presets: {', '.join(PRESETS)} (default gravitar). "
        f"The defaults below are those of {default.preset}. Ctrl-C saves the run; --resume goes on with it."
    )
    arguments = parse(TrainArguments, argv, prog, description, TrainArguments(default))
    config = replace(arguments.config, preset=default.preset)
    validate(config)
    return replace(arguments, config=config, resume=saved_in or arguments.resume), saved


def train_command(argv: Sequence[str], prog: str = "train.py") -> int:
    """`train [PRESET] [options]`."""
    arguments, saved = parse_train(argv, prog)
    config, resume = arguments.config, arguments.resume
    name = [config.env.id.replace("/", "-"), config.preset, str(config.seed), time.strftime("%Y%m%d-%H%M%S")]
    run_dir = arguments.run_dir or RUNS / "__".join(name)
    looks = torchrun_rank() == 0  # the other ranks never look at the folder
    if resume == "auto":
        if arguments.run_dir is None:
            raise UserError("--resume auto needs the run's folder: --run-dir DIR --resume auto begins or resumes it")
        saved = run_to_resume(run_dir) if looks else None
    elif resume is not None:
        if arguments.run_dir not in (None, resume):
            raise UserError("--resume goes on in its own folder: leave --run-dir out")
        run_dir = resume
    if saved is None and looks:
        check_free(run_dir)  # a mistake is told at once
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and resume != "auto":
            log.warning("torchrun's restart begins another run: with --run-dir DIR --resume auto it resumes the first")
    if saved is not None and (changed := differences(saved, config)):
        changes = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise UserError(f"{run_dir} was started with other settings, it cannot go on: {changes}")
    from gravitar_dqn.training import train

    return train(config, run_dir, resume=saved is not None, auto=resume == "auto", show_times=arguments.profile)


def evaluate_command(argv: Sequence[str], prog: str = "evaluate.py") -> int:
    """`eval RUN_DIR [options]`."""
    arguments = parse(EvaluateArguments, argv, prog, "Play whole games with a run's newest checkpoint.")
    run_dir, trained = agent_of(arguments, prog)
    from gravitar_dqn.evaluation.scores import evaluate, table
    from gravitar_dqn.runtime.execution import choose_device

    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("episodes", "epsilon", "seed", "max_steps")}
    how["device"] = choose_device(arguments.device)
    with Stop() as stop:
        try:
            result = evaluate(trained, **how, interrupted=lambda: stop.requested)
        except Interrupted as error:
            log.info(str(error))
            return stop.exit_code
    partial = stop.requested and result["episodes"] < arguments.episodes
    lines = [table(result)]
    try:
        if run_dir is not None:  # what is known of all games is not lost to what is known of a few
            played = Path(arguments.checkpoint).stem
            kinds = {played: played != "latest", "cut": arguments.max_steps > 0, "partial": partial}
            name = "_".join(["eval", *(kind for kind, applies in kinds.items() if applies)]) + ".json"
            write_json(run_dir / name, result)
            lines.append(f"written to {run_dir / name}")
    finally:  # the games were played: they are shown all the same
        print("\n".join(lines))
    if arguments.max_steps:
        log.info("games were cut off after %d steps: their scores are not those of whole games", arguments.max_steps)
    if partial:
        log.info("stopped after %d of %d games: long games are missing", result["episodes"], arguments.episodes)
    return stop.exit_code if partial else 0


def agent_of(arguments: PlayArguments, prog: str) -> tuple[Path | None, Trained]:
    """The run whose agent was asked for, None for one that ships, and the agent; UserError for neither, and both."""
    word, name = arguments.run_dir, arguments.pretrained
    if (not word) == (name is None):
        raise UserError(f"one agent is needed: {prog} RUN_DIR, or {prog} --pretrained NAME")
    if name is not None and arguments.checkpoint != "latest":
        raise UserError(f"--checkpoint {arguments.checkpoint} is a run's: weights that ship are one checkpoint")
    there = Path(word).exists() or (RUNS / word).exists()
    if word and not there and (PRETRAINED / f"{word}.safetensors").exists():
        raise UserError(f"{word} is no run's folder, but weights of that name ship: {prog} --pretrained {word}")
    run_dir = find_one(word) if word else None
    if run_dir is not None:
        load_run(run_dir)  # a wrong folder is known before torch is loaded
    from gravitar_dqn.evaluation import trained_agent

    if run_dir is None:
        return None, trained_agent.from_pretrained(str(name))
    return run_dir, trained_agent.from_run(run_dir, arguments.checkpoint)


def watch_command(argv: Sequence[str], prog: str = "watch.py") -> None:
    """`watch RUN_DIR [options]`."""
    arguments = parse(WatchArguments, argv, prog, "Play games with a run's newest checkpoint and record them.")
    _, trained = agent_of(arguments, prog)
    from gravitar_dqn.evaluation.acting import load_policy
    from gravitar_dqn.evaluation.overlay import make_look
    from gravitar_dqn.evaluation.video import record_game

    config, network = trained.config, load_policy(trained.config, trained.weights)
    look = make_look(trained, network) if arguments.overlay else None
    home = arguments.video_dir / trained.name
    for i in range(arguments.episodes):
        name = f"step_{trained.global_step}_seed_{arguments.seed + i}"
        path = home / f"{name}{'_overlay' if arguments.overlay else ''}.mp4"
        score = record_game(config, network, path, epsilon=arguments.epsilon, seed=arguments.seed + i, look=look)
        print(f"{path}: score {score:.0f}")


def sweep_command(argv: Sequence[str], prog: str = "sweep.py") -> int:
    """`sweep PRESET [PRESET ...] [options]`."""
    from gravitar_dqn.runtime.processes import available_cores
    from gravitar_dqn.tools import sweep

    description = "Train presets and variants of them with several seeds, evaluate each run, and compare."
    options = parse(sweep.SweepConfig, argv, prog, f"{description} Ctrl-C stops it; the same command again goes on.")
    train_prog = prog.replace("sweep", "train")
    core_sets = sweep.split_cores(available_cores(), max(options.parallel, 1))
    jobs = sweep.plan(options, len(core_sets[0]), lambda words: parse_train(words, train_prog)[0].config)
    return sweep.run(options, jobs, core_sets)


def plot_command(argv: Sequence[str], prog: str = "plot.py") -> None:
    """`plot RUN_DIR [RUN_DIR ...] [options]`."""
    from gravitar_dqn.tools.plot import PlotConfig, plot

    options = parse(PlotConfig, argv, prog, "Draw learning curves: scores of the training games.")
    plot(options)
    print(options.out)


def runs_command(argv: Sequence[str], prog: str = "runs.py") -> None:
    """`runs [FOLDER ...]`."""
    arguments = parse(RunsArguments, argv, prog, "List runs: how far each is, how well it plays, whether it goes on.")
    if arguments == RunsArguments() and not runs_in(RUNS):
        print(f"there is no run in {RUNS} yet: {prog.replace('runs', 'train')} begins one")
        return
    standings, complaints = [], []
    for run_dir in find(arguments.runs):
        try:
            standings.append(standing(run_dir))
        except UserError as error:
            complaints.append(error)
    print(runs_table(standings))
    for complaint in complaints:
        log.warning("%s: left out", complaint)


def export_command(argv: Sequence[str], prog: str = "export.py") -> None:
    """`export RUN [RUN ...] --to tensorboard`."""
    arguments = parse(ExportArguments, argv, prog, "Write what runs have logged for another program.")
    from gravitar_dqn.tools.export import export_tensorboard

    if not arguments.runs:
        raise UserError(f"no run: name one or more, {prog} runs/NAME")
    run_dirs = find(arguments.runs)
    if arguments.out is not None and len({run_dir.resolve().name for run_dir in run_dirs}) < len(run_dirs):
        raise UserError(f"two of the runs have the same name, {arguments.out} can hold only one: export them apart")
    for run_dir in run_dirs:
        print(export_tensorboard(run_dir, arguments.out))


def dashboard_command(argv: Sequence[str], prog: str = "dashboard.py") -> int:
    """`dashboard [RUN ...] [options]`."""
    options = parse(DashboardArguments, argv, prog, "A Visdom server on 127.0.0.1 that works without internet too.")
    if options.stop + options.prepare + bool(options.runs) > 1:
        raise UserError("runs, --stop or --prepare, not two of them")
    from gravitar_dqn.dashboard.visdom_files import browser_files
    from gravitar_dqn.dashboard.visdom_server import find_or_start_server, serve, stop_server

    if options.runs:
        run_dirs, server = find(options.runs), find_or_start_server(options.port)
        if server is None:
            return 2
        from gravitar_dqn.dashboard.draw import draw_runs

        draw_runs(run_dirs, server)
    elif options.stop:
        there, where = stop_server(options.port), f"on port {options.port}"
        print(f"the server {where} is stopped" if there else f"there is no server of this package {where}")
    elif options.prepare:
        print(f"browser files are in {browser_files()}")
    else:
        with contextlib.suppress(KeyboardInterrupt):
            serve(options.port)
    return 0


def bench_command(argv: Sequence[str], prog: str = "benchmark.py") -> None:
    """`bench [options]`."""
    settings = parse(BenchConfig, argv, prog, "Measure speed: the parts, whole training, and the peers.")
    if not settings.sizes or min(settings.sizes) < 1_000:
        raise UserError(f"--sizes is {' '.join(map(str, settings.sizes))}: every size must be at least 1000")
    from gravitar_dqn.benchmark.suite import run as measure

    measure(settings)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train_command,
    "eval": evaluate_command,
    "watch": watch_command,
    "sweep": sweep_command,
    "runs": runs_command,
    "plot": plot_command,
    "export": export_command,
    "bench": bench_command,
    "dashboard": dashboard_command,
}


SCRIPTS = {"evaluate": "eval", "benchmark": "bench"}  # names of files in scripts/ that are not the command's


def run(command: Callable[..., int | None], argv: Sequence[str], prog: str) -> int:
    """Run a command and return its exit code; an error that the user can mend is one line on standard error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as with `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  (open to the end)
    show_log()
    code, error = 0, None
    try:
        code = command(argv, prog) or 0
    except SystemExit as stop:  # after --help
        code = int(stop.code or 0)
    except (UserError, OSError, KeyboardInterrupt) as raised:
        error = raised
    try:
        sys.stdout.flush()
    except OSError as unwritten:
        forget_unwritten(sys.stdout)
        error = error or unwritten
    if isinstance(error, BrokenPipeError) and nobody_reads_stdout():  # as behind `| head`: end as other programs do
        return 128 + signal.SIGPIPE
    if error is not None:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 130 if interrupted else error.exit_code if isinstance(error, UserError) else 2
    try:
        if error is not None and speaks():
            print("interrupted" if interrupted else f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
    except OSError:  # a log on a full disk: the exit code still tells
        forget_unwritten(sys.stderr)
    return code


def main() -> None:
    """The installed command `gravitar-dqn`."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"gravitar-dqn {{{'|'.join(COMMANDS)}}} [options]; gravitar-dqn COMMAND --help tells more")
        sys.exit(0)
    if name in ("-V", "--version"):
        print("gravitar-dqn", *filter(None, [metadata.version("gravitar-dqn"), commit()]))
        sys.exit(0)
    name = SCRIPTS.get(name, name)
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: unknown command {name!r}: {hint}there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(COMMANDS[name], argv, f"gravitar-dqn {name}"))
