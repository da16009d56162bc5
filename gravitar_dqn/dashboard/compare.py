"""Several runs beside each other: a table of them, then every chart that two of them share. Touches no file and no
server.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from gravitar_dqn.dashboard.charts import BLUE, GREEN, ORANGE, PURPLE, Chart, Line
from gravitar_dqn.dashboard.panes import Pane, Window, log_axis, options, state_badge, text_pane
from gravitar_dqn.dashboard.view import RunView

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito's: one a run
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # one a line of a run
BELOW = 6  # lines whose names find room below a chart
WIDTH, HEIGHT = 610, 400  # pixels: names are long; two columns in a page 1280 wide


@dataclass(frozen=True)
class ComparedRun:
    """A run, and how it is told apart from the others."""

    view: RunView
    label: str
    color: str


class ComparisonView:
    """The windows of several runs in one page. Whoever owns the runs' views updates them."""

    def __init__(self, views: Sequence[RunView]) -> None:
        self._views = views
        names = "+".join(sorted(view.environment for view in views))
        self.environment = f"compare-{hashlib.sha256(names.encode()).hexdigest()[:8]}"

    def windows(self) -> Iterator[Window]:
        """A table of the runs, then the charts that two of them have, in their order.

        Charts of two runs are one when title and x axis are the same.
        """
        runs = [
            ComparedRun(view, label, COLORS[i % len(COLORS)])
            for i, (view, label) in enumerate(zip(self._views, labels_of(self._views), strict=True))
        ]
        charts: dict[tuple[str, str], dict[ComparedRun, Chart]] = {}
        for run in runs:
            for chart in run.view.board.charts:
                charts.setdefault((chart.title, run.view.board.xlabel), {}).setdefault(run, chart)
        shared = {name: sources for name, sources in charts.items() if len(sources) > 1}
        table = _table(runs, bool(shared))
        yield table["win"], table["data"], lambda: table
        for name, sources in shared.items():
            key = re.sub(r"\W+", "-", " ".join(name).lower())
            revision = [(run.label, run.view.revision(chart)) for run, chart in sources.items()]
            yield key, revision, partial(_chart, key, sources)


def labels_of(views: Sequence[RunView]) -> list[str]:
    """What each run is called: preset and seed, its folder too where that is not enough; else its environment."""
    labels = [view.environment if view.run is None else view.run.label for view in views]
    with_folders = [f"{label} ({view.run_dir.resolve().name})" for label, view in zip(labels, views, strict=True)]
    for longer in (with_folders, [view.environment for view in views]):
        runs = Counter(labels)
        labels = [more if runs[label] > 1 else label for label, more in zip(labels, longer, strict=True)]
    return labels


def _table(runs: Sequence[ComparedRun], shared: bool) -> Pane:
    """Which run has which colour, how it stands, and the way to its page."""
    rows = "".join(
        f"<tr><td style='color:{run.color};font-size:20px;padding-right:8px'>&#9644;</td>"
        f"<td style='padding-right:14px'>{html.escape(run.label)}</td>"
        f"<td style='padding-right:14px'>{state_badge(run.view.run.state) if run.view.run else ''}</td>"
        f"<td><a href='/env/{run.view.environment}'>{run.view.environment}</a></td></tr>"
        for run in runs
    )
    note = "" if shared else "<p>These have no chart in common: other games are counted in other units.</p>"
    pane = text_pane("runs", "Runs", f"<table style='font-size:13px'>{rows}</table>{note}")
    return {**pane, "opts": options("Runs", WIDTH, HEIGHT)}


def _chart(key: str, sources: Mapping[ComparedRun, Chart]) -> Pane:
    """One chart of several runs. A run has a colour, its lines are told apart by their dashes."""
    names = list(dict.fromkeys(line.name for chart in sources.values() for line in _compared(chart)))
    data: list[Pane] = []
    layouts: list[Pane] = []
    full: list[Pane] = []  # layouts of runs that have data
    for run, chart in sources.items():
        pane = run.view.board.pane(chart)
        compared = _compared(chart)
        traces = [
            {
                **trace,
                "name": html.escape(f"{run.label}: {line.name}"),
                "line": {"color": run.color, "dash": DASHES[names.index(line.name) % len(DASHES)], "width": 2},
                "marker": {"color": run.color, "size": 6},
            }
            for line, trace in zip(chart.lines, pane["data"], strict=True)
            if line in compared
        ]
        data += traces
        layouts.append(pane["layout"])
        if any(trace["x"] for trace in traces):
            full.append(pane["layout"])
    legend = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    if len(data) > BELOW:
        legend = {"x": 1.02, "y": 1, "font": {"size": 9}}
    # With axes, if one of them has any: a run that has just begun says only when there will be data.
    layout = {**(full or layouts)[0], "showlegend": bool(full), "legend": legend}
    if layout["yaxis"].get("type") == "log":
        layout["yaxis"] = {**layout["yaxis"], **log_axis(y for trace in data for y in trace["y"])}
    title = next(iter(sources.values())).title
    return {"data": data, "win": key, "layout": layout, "opts": options(title, WIDTH, HEIGHT)}


def _compared(chart: Chart) -> Sequence[Line]:
    """The lines of a chart that are drawn beside another run's; all, where that would be none."""
    return [line for line in chart.lines if line.compared] or chart.lines
