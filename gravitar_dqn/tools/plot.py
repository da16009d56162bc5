"""Learning curves of runs as a picture: raw scores of the training games, seeds of the same settings as a band."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from gravitar_dqn.config import bounded, differences
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.files import read_json, read_rows
from gravitar_dqn.run.folder import load_run
from gravitar_dqn.run.status import find

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
PUBLISHED = Path(__file__).with_name("published_curves.csv")
RANDOM_PLAY, HUMAN = 180.0, 3351.0  # Gravitar with sticky actions; the usual human constant
# Okabe and Ito's, told apart by colour-blind people too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")  # when the colours are used up
GREY = "0.45"
GRID = 400  # points of a curve


@dataclass(frozen=True)
class PlotConfig:
    """What is drawn."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, a folder of runs (a sweep's, say) for all in it, names of runs in runs/, or presets."""
    x: Literal["frames", "minutes", "steps"] = "frames"
    """Emulator frames, minutes of training, or agent steps."""
    out: Path = Path("curves.png")
    """The picture; its ending decides on the format."""
    published: bool = False
    """Gravitar only: also published curves, random play and the human score."""
    smooth: int = bounded(100, low=1, high=1e9)
    """Games of the moving mean."""
    title: str = ""
    """Above the curves."""


@dataclass(frozen=True)
class Curve:
    """The scores of a run's training games."""

    run: str  # its folder's name
    preset: str
    seed: int
    settings: list[str]  # that differ from the preset's, as they are typed, without the seed
    game: str
    x: Floats  # (games,), rising
    scores: Floats  # (games,), a moving mean
    evaluation: tuple[float, float] | None  # x and mean of eval.json


def plot(options: PlotConfig) -> None:
    """Draw runs to `options.out`; UserError when there is nothing to draw, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("there is no matplotlib: pip install -e '.[plot]' brings it") from None
    curves = read_curves(options)
    if len(played := sorted({curve.game for curve in curves})) > 1:
        raise UserError(f"scores of {' and '.join(played)} have nothing in common: name runs of one game")
    if options.published:
        check_published(options, curves)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, group) in enumerate(grouped(curves).items()):
        draw(axes, name, group, COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)])
    if options.published:
        draw_published(axes)
    if any(curve.evaluation is not None for curve in curves):
        axes.plot([], [], "D", color=GREY, markersize=5, label="evaluation, mean")
    xlabel = {"frames": "emulator frames", "minutes": "minutes of training", "steps": "agent steps"}[options.x]
    axes.set(xlabel=xlabel, ylabel=f"score, mean of {options.smooth} games", title=options.title or curves[0].game)
    axes.xaxis.set_major_formatter(_short)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=8, framealpha=0.8)
    try:
        figure.savefig(options.out)
    except ValueError as error:  # an ending that stands for no format
        raise UserError(f"--out is {options.out}: {error}") from None


def _short(value: float, position: float) -> str:
    """A number on an axis: 1500000 as 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def read_curves(options: PlotConfig) -> list[Curve]:
    """All runs with games; a warning for each without, and UserError when no run is left."""
    curves, reasons = [], []
    if not options.runs:
        raise UserError("no run: name one or more, plot runs/NAME")
    for run_dir in find(options.runs):
        try:
            curves.append(read_curve(run_dir, options.x, options.smooth))
        except UserError as error:
            reasons.append(str(error))
    if not curves:
        raise UserError(f"{reasons[0]}, and {len(reasons) - 1} more like it" if reasons[1:] else reasons[0])
    for reason in reasons:
        log.warning(f"{reason}: left out")
    return curves


def read_curve(run_dir: Path, unit: str, smooth: int) -> Curve:
    """The scores of a run over `unit` (frames, minutes or steps); UserError when it has none yet."""
    config = load_run(run_dir)
    steps, scores = read_columns(run_dir / "episodes.csv", ("global_step", "episodic_return"))
    logged, frames, seconds = read_columns(run_dir / "metrics.csv", ("global_step", "frames", "wall_seconds"))
    if len(steps) < 2 or not len(logged):
        raise UserError(f"{run_dir} has not finished two games yet")
    frames_per_step = frames[-1] / max(logged[-1], 1)

    def over(steps: Floats) -> Floats:
        if unit == "minutes":
            return np.asarray(np.interp(steps, np.append(0, logged), np.append(0, seconds)) / 60)
        return steps * frames_per_step if unit == "frames" else steps

    evaluation = evaluation_of(run_dir)
    if evaluation is not None:
        evaluation = float(over(np.array(evaluation[0] / frames_per_step))), evaluation[1]
    changed = differences(PRESETS.get(config.preset, config), config)
    settings = [f"{name}={value}".replace("_", "-") for name, (_, value) in changed.items() if name != "seed"]
    name, scores = run_dir.resolve().name, moving_mean(scores, smooth)
    return Curve(name, config.preset, config.seed, settings, config.env.id, over(steps), scores, evaluation)


def read_columns(path: Path, names: Sequence[str]) -> Floats:
    """Columns of a run's CSV file, (len(names), rows); no rows when there is no file."""
    rows = read_rows(path)
    try:
        return np.array([[float(row[name]) for row in rows] for name in names])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def moving_mean(values: Floats, window: int) -> Floats:
    """Mean of each value and the `window` - 1 before it, or as many as there are."""
    sums = np.append(0.0, np.cumsum(values))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return np.asarray((sums[last] - sums[first]) / (last - first), dtype=np.float64)


def evaluation_of(run_dir: Path) -> tuple[float, float] | None:
    """Frames trained and mean score in eval.json; None when there is none."""
    path = run_dir / "eval.json"
    try:
        result = read_json(path) if path.exists() else None
        return None if result is None else (float(result["frames_trained"]), float(result["mean"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def grouped(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Runs that differ only in their seed, by a name that says what tells them from the others.

    Where that is all the difference there is, every run is alone.
    """
    shared = set.intersection(*(set(curve.settings) for curve in curves))
    presets = {curve.preset for curve in curves}
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        differing = [setting for setting in curve.settings if setting not in shared]
        preset = [curve.preset] if len(presets) > 1 or not differing else []
        groups.setdefault(" ".join(preset + differing), []).append(curve)
    if len(groups) == 1:  # nothing to compare but the runs themselves
        names = [f"{curve.preset}, seed {curve.seed}" for curve in curves]
        names = names if len(set(names)) == len(names) else [curve.run for curve in curves]
        return {name: [curve] for name, curve in zip(names, curves, strict=True)}
    return groups


def draw(axes: Axes, name: str, group: Sequence[Curve], color: str, style: str) -> None:
    """One run as a line; several as their mean, and a band from the lowest to the highest as far as all of them go."""
    shortest = min(group, key=lambda curve: curve.x[-1])
    end = shortest.x[-1]
    if end < 0.9 * max(curve.x[-1] for curve in group):
        log.warning("%s is drawn as far as %s goes: name the runs that went further alone", name, shortest.run)
    grid = np.linspace(max(curve.x[0] for curve in group), end, GRID)
    scores = np.stack([np.interp(grid, curve.x, curve.scores) for curve in group])
    label = name if len(group) == 1 else f"{name} ({len(group)} runs)"
    axes.plot(grid, scores.mean(0), style, color=color, linewidth=1.6, label=label)
    if len(group) > 1:
        axes.fill_between(grid, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
    for curve in group:
        if curve.evaluation is not None:
            axes.plot(*curve.evaluation, "D", color=color, markersize=5, clip_on=False)


def check_published(options: PlotConfig, curves: Sequence[Curve]) -> None:
    """Raise UserError where published curves do not belong beside these."""
    if others := [curve.game for curve in curves if "gravitar" not in curve.game.lower()]:
        raise UserError(f"--published has curves of Gravitar only, not of {others[0]}")
    if options.x != "frames":
        raise UserError(f"--published has scores by frames, not by {options.x}: --x frames")


def read_published() -> dict[str, Floats]:
    """Published curves of Gravitar by agent, (2, points): frames and scores."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(PUBLISHED):
        points.setdefault(row["agent"], []).append((1e6 * float(row["frames_millions"]), float(row["score"])))
    return {agent: np.array(those).T for agent, those in points.items()}


def draw_published(axes: Axes) -> None:
    """Published curves over the frames that the runs went, at least 10 million; random play and a human's score."""
    end = max(axes.get_xlim()[1], 10e6)
    names = {"random play": RANDOM_PLAY, "human": HUMAN}
    for level in names.values():
        axes.axhline(level, linestyle=":", color=GREY, linewidth=1)
    for agent, (frames, scores) in read_published().items():
        if frames[0] <= end:  # its first point lies in the picture
            last = min(end, frames[-1])
            shown = np.append(frames[frames < last], last)
            drawn = np.interp(shown, frames, scores)
            axes.plot(shown, drawn, "--", color=GREY, linewidth=1)
            names[agent] = float(drawn[-1])
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], HUMAN))
    top, above = axes.get_ylim()[1], -np.inf
    for name, height in sorted(names.items(), key=lambda item: item[1]):
        above = max(height, above + 0.042 * top)  # names of neighbours do not cover each other
        style: dict[str, Any] = {"va": "center", "fontsize": 7, "color": GREY, "annotation_clip": False}
        axes.annotate(name, (end, above), xytext=(4, 0), textcoords="offset points", **style)
