"""A campaign's table: what became of its stages, how the run went and how it plays, as Markdown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gravitar_dqn.campaign_plan import STAGES, CampaignConfig, State
from gravitar_dqn.errors import UserError
from gravitar_dqn.files import read_json, read_rows

Rows = Iterable[Sequence[str]]
LONGEST = 160  # characters of what a stage said


def table(options: CampaignConfig, state: State) -> str:
    """All that is known so far."""
    parts = [f"# {title(options, state)}", "", *markdown(("stage", "outcome", "minutes", ""), stages(state))]
    for head, rows in (
        (("run", ""), list(training(options, state))),
        (("evaluation", ""), list(evaluation(options.run_dir))),
        (("benchmark, steps/s", "median", "ratio"), list(benchmark(options.dir / "benchmark.json"))),
    ):
        if rows:
            parts += ["", *markdown(head, rows)]
    return "\n".join(parts) + "\n"


def title(options: CampaignConfig, state: State) -> str:
    """What was asked for, as it can be asked for again."""
    words = ["campaign", options.preset, f"--minutes {options.minutes:g}", f"--seed {options.seed}"]
    words += [f'--settings "{state.options["settings"]}"'] * bool(options.settings)
    words += [f"--device {options.device}"] * (options.device != "auto") + ["--quick"] * options.quick
    return " ".join(words)


def markdown(head: Sequence[str], rows: Rows) -> Iterator[str]:
    """Lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"


def cell(text: str) -> str:
    """Text that breaks no table."""
    return " ".join(text.split()).replace("|", r"\|")


def stages(state: State) -> Rows:
    """A row for each stage."""
    for name in STAGES:
        stage = state.stages[name]
        said = stage.said if len(stage.said) <= LONGEST else f"{stage.said[: LONGEST - 3]}..."
        if stage.outcome in ("failed", "cut short"):
            said += f"; more in logs/{name}.log"
        yield name, stage.outcome or "not yet", f"{stage.seconds / 60:.1f}", said


def training(options: CampaignConfig, state: State) -> Rows:
    """How far the run went."""
    rows = read_rows(options.run_dir / "metrics.csv")
    if not rows:
        return
    last = rows[-1]
    steps, seconds = int(last["global_step"]), float(last["wall_seconds"])
    yield "steps", f"{steps:,}"
    yield "frames", f"{int(last['frames']):,}"
    yield "gradient steps", f"{int(last['num_updates']):,}"
    yield "games", f"{int(last['episodes']):,}"
    yield "minutes of training", f"{seconds / 60:.1f}"
    yield "steps per second", f"{steps / max(seconds, 1e-9):,.0f}"
    if int(last["episodes"]):
        yield "mean of the last 100 training games", f"{float(last['return_mean']):.1f}"
    yield "minutes of all calls", f"{state.seconds / 60:.1f}"
    yield "device", "; ".join(state.machines) or "unknown"
    yield "commit", "; ".join(state.commits) or "unknown"


def evaluation(run_dir: Path) -> Rows:
    """How well the agent plays."""
    result = _read(run_dir / "eval.json")
    if result:
        low, high = result["iqm_ci95"]
        yield "games, epsilon", f"{result['episodes']}, {result['epsilon']:g}"
        yield "mean, standard deviation", f"{result['mean']:.1f}, {result['std']:.1f}"
        yield "interquartile mean, 95 % interval", f"{result['iqm']:.1f}, {low:.1f} to {high:.1f}"
        if result["human_normalized"] is not None:
            yield "human-normalized", f"{100 * result['human_normalized']:.1f} %"
    snapshots = _read(run_dir / "snapshots.json")
    if snapshots:
        means = snapshots["mean"]
        told = f"{sum(means) / len(means):.1f}, {min(means):.1f} to {max(means):.1f}"
        yield f"{len(means)} snapshots: mean, lowest to highest", told


def benchmark(path: Path) -> Rows:
    """The speeds of whole training."""
    for row in _read(path).get("rows", []):
        if row["unit"] == "steps/s" and row["section"] == "training":
            ratio = f"{row['ratio_median']:.2f}x" if "ratio_median" in row else ""
            yield row["name"], f"{row['median']:,.0f}", ratio


def _read(path: Path) -> dict[str, Any]:
    """The table in a JSON file; an empty one where there is no such file yet."""
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}
