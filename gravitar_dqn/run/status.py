"""The runs in a folder and how each of them stands, by the files that they leave. Nothing is written, nothing of torch
is imported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gravitar_dqn.config import RunConfig
from gravitar_dqn.errors import UserError, did_you_mean
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.files import last_row, read_json, read_rows
from gravitar_dqn.run.folder import is_held, load_run

RUNS = Path("runs")  # where `train` makes the folders of its runs

FEW_GAMES = 20  # fewer say little

State = Literal["running", "finished", "stopped", "died"]


@dataclass(frozen=True, order=True)
class Evaluation:
    """Whole games of a fixed policy."""

    mean: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.mean:,.1f} ({self.episodes} games)"


@dataclass(frozen=True)
class Standing:
    """How far a run has come."""

    run_dir: Path
    config: RunConfig
    state: State  # finished: a limit is reached; stopped: all was saved; died: what came after a checkpoint is lost
    global_step: int
    frames: int
    episodes: int
    minutes: float  # of training
    progress: float  # share of the limit that is nearest, 0 to 1
    mean_score: float | None  # of the last 100 training games; None before the first has ended
    best: Evaluation | None  # the one with the highest mean; None without one

    @property
    def label(self) -> str:
        """What tells it from other runs at a glance: preset and seed."""
        return f"{self.config.preset}, seed {self.config.seed}"

    @property
    def minutes_left(self) -> float | None:
        """Until its end, at the speed so far; None for a run that does not go on, or has just begun."""
        if self.state != "running" or self.progress <= 0:
            return None
        return self.minutes * (1 - self.progress) / self.progress


def standing(run_dir: Path, *, running: bool | None = None) -> Standing:
    """How the run in a folder stands; UserError when there is none in it.

    `running` says whether a process trains in it, for a caller who knows; None: look whether one holds its lock.
    """
    config = load_run(run_dir)
    row = last_row(run_dir / "metrics.csv")
    step, episodes, seconds = (int(_number(row, name)) for name in ("global_step", "episodes", "wall_seconds"))
    score = _number(row, "return_mean", math.nan)
    progress = min(1.0, max(shares(config, step, episodes, seconds)))
    saved = max((path.stem for path in (run_dir / "checkpoints").glob("step_*.pt")), default="")
    state: State = "died"
    if is_held(run_dir) if running is None else running:
        state = "running"
    elif row and saved == f"step_{step:012d}":  # what it ended with
        state = "finished" if progress >= 1 else "stopped"
    return Standing(
        run_dir=run_dir,
        config=config,
        state=state,
        global_step=step,
        frames=int(_number(row, "frames")),
        episodes=episodes,
        minutes=seconds / 60,
        progress=progress,
        mean_score=score if math.isfinite(score) else None,
        best=best_evaluation(run_dir),
    )


def _number(row: Mapping[str, str], name: str, default: float = 0.0) -> float:
    try:
        value = float(row.get(name, ""))
    except ValueError:
        return default
    return value if math.isfinite(value) else default


def shares(config: RunConfig, global_step: int, episodes: int, wall_seconds: float) -> list[float]:
    """How much of each of its limits a run has used up."""
    return [
        global_step / config.total_steps,
        episodes / config.total_episodes if config.total_episodes else 0.0,
        wall_seconds / (60 * config.total_minutes) if config.total_minutes else 0.0,
    ]


def best_evaluation(run_dir: Path) -> Evaluation | None:
    """The evaluation with the highest mean, of those during training and later ones; few games only without others."""
    rows = read_rows(run_dir / "evaluations.csv")
    found = [Evaluation(_number(row, "mean", math.nan), int(_number(row, "games"))) for row in rows]
    for name in ("eval.json", "eval_best.json"):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # none, or a damaged one
            result = read_json(run_dir / name)
            found.append(Evaluation(float(result["mean"]), int(result["episodes"])))
    found = [each for each in found if math.isfinite(each.mean)]
    return max([each for each in found if each.episodes >= FEW_GAMES] or found, default=None)


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs in a folder, the newest last."""
    homes = {config.parent for config in folder.glob("*/config.json")}
    return sorted(homes, key=lambda home: ((home / "config.json").stat().st_mtime, home.name))


def find(words: Sequence[str | Path], home: Path = RUNS) -> list[Path]:
    """The folders of the runs that were named, each once.

    A word is a run's folder; a folder of runs; the name of one in `home`, or how its name begins; or a preset, for all
    its runs in `home`.
    UserError for a word that is none of these.
    """
    return list(dict.fromkeys(run_dir for word in words for run_dir in _named(str(word), home)))


def find_one(word: str | Path, home: Path = RUNS) -> Path:
    """The folder of the one run that was named; UserError where several fit."""
    first, *others = find([word], home)
    if others:
        names = ", ".join(run_dir.name for run_dir in (first, *others))
        raise UserError(f"{word} stands for {1 + len(others)} runs, name one of them: {names}")
    return first


def _named(word: str, home: Path) -> Iterable[Path]:
    for path in (Path(word), home / word):
        if (path / "config.json").exists():
            return [path]
        if path.is_dir() and (inside := runs_in(path)):
            return inside
    there = runs_in(home)
    if word in PRESETS:
        if of_preset := [run_dir for run_dir in there if _preset(run_dir) == word]:
            return of_preset
        raise UserError(f"there is no run of the preset {word} in {home}")
    if Path(word).is_dir():
        raise UserError(f"{word} is not a run's folder, and there is none in it")
    if beginning := [run_dir for run_dir in there if run_dir.name.startswith(word)]:
        return beginning
    hint = did_you_mean(word, [*(run_dir.name for run_dir in there), *PRESETS])
    raise UserError(f"{word} is no run: {hint}name a run's folder, one in {home}, or a preset")


def _preset(run_dir: Path) -> Any:
    with contextlib.suppress(UserError):  # a damaged one is no reason to find none
        return read_json(run_dir / "config.json").get("preset")
    return None


def table(standings: Sequence[Standing]) -> str:
    """The runs as lines for a terminal, under a line of headings."""
    rows: list[tuple[str, ...]] = [
        ("run", "preset", "seed", "state", "steps", "minutes", "done", "last 100", "best evaluation")
    ]
    for run in standings:
        scores = "-" if run.mean_score is None else f"{run.mean_score:,.1f}", str(run.best or "-")
        amounts = f"{run.global_step:,}", f"{run.minutes:.1f}", f"{run.progress:.0%}"
        rows.append((run.run_dir.name, run.config.preset, str(run.config.seed), run.state, *amounts, *scores))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<><>>>>>", widths, strict=True))  # words, numbers
    return "\n".join(line.format(*row).rstrip() for row in rows)
