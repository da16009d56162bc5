"""What commands take, and the way from words to it. Every mistake is one line that says what would do."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gravitar_dqn.config import RunConfig, bounded, check_bounds, flatten, to_dict
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.status import RUNS

T = TypeVar("T")


@dataclass(frozen=True)
class TrainArguments:
    """What `train` takes beside the settings of the run."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """The run's folder; by default runs/<env>__<preset>__<seed>__<time>."""
    resume: Literal["auto"] | Path | None = None
    """Resume the run in this folder from its newest checkpoint; auto: begin the run in --run-dir, or resume the one
    that is there, which must have the settings given here."""
    profile: bool = False
    """Print at the end where the time went."""


@dataclass(frozen=True)
class PlayArguments:
    """Who plays how many games, and how."""

    run_dir: tyro.conf.Positional[str] = ""
    """The run's folder, or its name in runs/."""
    pretrained: str | None = None
    """Instead of a run: the name of weights that ship with the package."""
    checkpoint: str = "latest"
    """Which of a run's checkpoints plays: latest; best, of those that --eval-every evaluated while it trained; or the
    name of a file in its folder checkpoints/."""
    episodes: int = bounded(100, low=1)
    """Games to play."""
    epsilon: float = bounded(0.001, high=1)
    """Probability of a random action."""
    seed: int = bounded(742, high=2**30)
    """Seeds the games and the random actions."""


@dataclass(frozen=True)
class EvaluateArguments(PlayArguments):
    """Play whole games with a run's newest checkpoint and write eval.json; or with weights that ship."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_steps: int = bounded(0)
    """Cut a game off after this many agent steps, as an idle agent's that would never end; 0: as in training."""


@dataclass(frozen=True)
class WatchArguments(PlayArguments):
    """Play games with a run's newest checkpoint, or with weights that ship, and record them to videos/<run>/."""

    episodes: int = bounded(1, low=1)
    """Games to play."""
    video_dir: Path = Path("videos")
    """Recordings go to <video_dir>/<run>/."""
    overlay: bool = False
    """Show beside the game what the agent makes of it: values of the actions, curiosity, RANDAL's pixel control."""


@dataclass(frozen=True)
class RunsArguments:
    """Which runs are listed."""

    runs: tyro.conf.Positional[tuple[str, ...]] = (str(RUNS),)
    """Folders of runs, of one run each or of many; names of runs in runs/; or presets."""


@dataclass(frozen=True)
class ExportArguments:
    """What is written for which program."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs, or names of runs in runs/."""
    to: Literal["tensorboard"] = "tensorboard"
    """The program."""
    out: Path | None = None
    """Where to, <out>/<run>/; by default <run's folder>/tensorboard/."""


@dataclass(frozen=True)
class DashboardArguments:
    """A Visdom server on this machine, and runs that are drawn on it."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Draw these runs, and several of them in one more page: folders, names of runs in runs/, or presets."""
    port: int = bounded(8097, low=1, high=65_535)
    """Where it listens."""
    stop: bool = False
    """Stop the server on the port, also one that training started."""
    prepare: bool = False
    """Only fetch the browser files, for a start without internet."""


NUMBERS = ConstructorRegistry()


@NUMBERS.primitive_rule
def _whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def whole_number(word: str) -> int:
    """1000000, 1_000_000 or 1e6; ValueError for what is no whole number."""
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(InvalidOperation):
        value = Decimal(word)
        if value.is_finite() and value.adjusted() < 30 and value == value.to_integral_value():
            return int(value)
    raise ValueError(f"{word!r} is no whole number, such as 1000000, 1_000_000 or 1e6")


def parse(build: Callable[..., T], argv: Sequence[str], prog: str, description: str, default: Any = None) -> T:
    """tyro's parser, with every mistake as one UserError line; `--help` prints and exits.

    Numbers are held to their bounds here, but where there is a `default`: a run's settings are judged as a whole.
    """
    said = io.StringIO()
    options: dict[str, Any] = {"prog": prog, "registry": NUMBERS, **({} if default is None else {"default": default})}
    try:
        with contextlib.redirect_stderr(said):
            result, unknown = tyro.cli(
                build, args=list(argv), description=description, return_unknown_args=True, **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        box = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]|^[ -]+$", "", said.getvalue(), flags=re.MULTILINE)
        title, _, text = box.strip().partition("\n")
        message = " ".join(re.split("(?:Argument|For full) helptext", text)[0].split())
        raise UserError(f"{message or title} ({prog} --help lists all)") from None
    if unknown:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tyro offers nothing newer that knows the names
            parser = tyro.extras.get_parser(build, **options)
        raise UserError(complaint(unknown, list(parser._option_string_actions), prog))
    if default is None:
        check_bounds(result, "--")
    return result


def complaint(unknown: Sequence[str], known: Sequence[str], prog: str) -> str:
    """One line on the first of the words that are `unknown`, with the nearest of the options that are `known`."""
    option, _, value = unknown[0].partition("=")
    value = value or "".join(unknown[1:2])
    trains = "--resume" in known  # presets are `train`'s
    if trains and (option in PRESETS or option == "--preset"):
        preset = option if option in PRESETS else value if value in PRESETS else "PRESET"
        return f"the preset comes first: {prog} {preset} [options], and there is only one"
    name = option.removeprefix("--").replace("-", "_")
    if trains and (owners := [preset for preset, config in PRESETS.items() if name in flatten(to_dict(config))]):
        return f"{option} is a setting of other presets, which come first: {prog} {owners[0]} {option} ..."
    kind = "option" if option.startswith("-") else "argument"
    near = " or ".join(nearest(option.replace("_", "-"), known))
    return f"unknown {kind} {unknown[0]!r}: " + (f"did you mean {near}?" if near else f"{prog} --help lists all")


def nearest(option: str, known: Sequence[str]) -> list[str]:
    """The options that end in the same words, in any group; else the one spelled most alike, with its group or not."""
    name = option.rpartition(".")[2].lstrip("-")
    spellings = {f"--{other.rpartition('.')[2].lstrip('-')}": other for other in reversed(known)}
    spellings |= {other: other for other in known}
    alike = difflib.get_close_matches(option, spellings, n=1, cutoff=0.8)
    return [other for other in known if other.endswith((f"-{name}", f".{name}"))] or [spellings[word] for word in alike]
