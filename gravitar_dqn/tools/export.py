"""A run's logs for TensorBoard: event files that hold what its CSV files hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gravitar_dqn.config import flatten
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.files import read_json, read_rows
from gravitar_dqn.run.folder import load_run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The ending of the event files that are written here: only these are ever replaced.
OURS = ".gravitar-dqn"
# TensorBoard's sections, and parts of the names of their columns; a column is shown in the first that it fits.
SECTIONS = {
    "curiosity": ("int_reward", "int_return", "variance_int"),
    "score": ("return_mean", "return_min", "return_max", "episodic_return", "episodic_length"),
    "losses": ("_loss",),
    "speed": ("sps", "samples_per_second"),
    "progress": ("wall_seconds", "frames", "num_updates", "episodes", "buffer_fill"),
    "exploration": ("epsilon", "entropy"),
}
REST = "learning"
EVALUATION = "evaluation"  # all of evaluations.csv, whose columns have names of their own

Row = dict[str, float]


def export_tensorboard(run_dir: Path, out: Path | None = None) -> Path:
    """Write a run's metrics, games and evaluations as TensorBoard's event files, and return their folder.

    They take the place of those that were exported there before. UserError without rows, or without TensorBoard.

    Args:
        run_dir: the run's folder.
        out: the folder for a folder of the run's name; without one it is `tensorboard` in the run's.
    """
    load_run(run_dir)  # a wrong folder is known before torch is loaded
    tables = {name: read_numbers(run_dir / f"{name}.csv") for name in ("metrics", "episodes", "evaluations")}
    if not any(tables.values()):
        raise UserError(f"{run_dir} has no rows yet: there is nothing to export")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("there is no TensorBoard: pip install -e '.[tensorboard]' brings it") from None
    home = run_dir / "tensorboard" if out is None else out / run_dir.resolve().name
    home.mkdir(parents=True, exist_ok=True)
    before = exported(home)
    try:
        with SummaryWriter(str(home), filename_suffix=OURS) as writer:
            write(writer, run_dir, tables)
    except BaseException:
        remove(exported(home) - before)  # half of a run
        raise
    remove(before)
    return home


def exported(home: Path) -> set[Path]:
    """The event files that an export has left in a folder."""
    return {path for path in home.glob(f"events.out.tfevents.*{OURS}") if path.is_file()}


def remove(paths: set[Path]) -> None:
    """Remove files, if they are still there."""
    for path in paths:
        path.unlink(missing_ok=True)


def write(writer: SummaryWriter, run_dir: Path, tables: Mapping[str, Sequence[Row]]) -> None:
    """Everything about a run."""
    time_of = clock(run_dir, tables["metrics"])
    record = read_json(run_dir / "config.json")
    record.pop("metrics", None)  # names, no setting
    settings = flatten(record.pop("config")) | flatten(record)
    writer.add_text("settings", as_table(settings), 0, time_of(0))
    for table, rows in tables.items():
        # A resumed run keeps the evaluations of steps that it plays again: its rows are not in order.
        for row in sorted(rows, key=lambda row: row["global_step"]):
            step = row["global_step"]
            for name, value in row.items():
                if name != "global_step":
                    section = EVALUATION if table == "evaluations" else section_of(name)
                    writer.add_scalar(f"{section}/{name}", value, int(step), time_of(step))


def read_numbers(path: Path) -> list[Row]:
    """The rows of a run's CSV file, without the cells that are empty or not finite; UserError for other cells."""
    try:
        numbers = [{name: float(value) for name, value in row.items() if value} for row in read_rows(path)]
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    rows = [{name: value for name, value in row.items() if math.isfinite(value)} for row in numbers]
    if not all("global_step" in row for row in rows):
        raise UserError(f"{path} cannot be read: a row has no global_step")
    return rows


def clock(run_dir: Path, metrics: Sequence[Row]) -> Callable[[float], float]:
    """When a step was played, in seconds of Unix time, as if the run had gone on without a break from its start."""
    played = [row for row in metrics if "wall_seconds" in row]
    steps = np.array([0.0, *(row["global_step"] for row in played)])
    seconds = np.array([0.0, *(row["wall_seconds"] for row in played)])
    # A resume writes config.json anew, and a copied folder has the times of the copying: the earlier one is nearer.
    start = (run_dir / "config.json").stat().st_mtime
    if played:
        start = min(start, (run_dir / "metrics.csv").stat().st_mtime - seconds[-1])
    return lambda step: float(start + np.interp(step, steps, seconds))


def section_of(column: str) -> str:
    """TensorBoard's section for a column of metrics.csv or episodes.csv."""
    fitting = (section for section, parts in SECTIONS.items() if any(part in column for part in parts))
    return next(fitting, REST)


def as_table(values: Mapping[str, Any]) -> str:
    """Names and values as a table in Markdown, which TensorBoard shows."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])
