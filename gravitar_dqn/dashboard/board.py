"""The charts of a run: from the rows of its CSV files to Visdom's windows. Touches no file and no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gravitar_dqn.agents import entry_of
from gravitar_dqn.charts import BUFFER, EVALUATION, SCORE, Chart, Layout, Line, Reduce, speed_chart
from gravitar_dqn.dashboard.panes import Pane, log_axis, nothing_yet, options
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import from_dict

Row = Mapping[str, float]

CAPACITY = 600  # most points of a trace


class Trace:
    """A curve of any length in at most `capacity` points.

    Samples go into buckets of equal count; when `capacity` buckets are full they merge in pairs, so memory stays flat
    and old and new points have the same weight. The last bucket may be partly filled. Non-finite samples are dropped.
    """

    def __init__(self, reduce: Reduce = "mean", capacity: int = CAPACITY) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be even and positive, not {capacity}")
        self.count = 0  # samples taken
        self._reduce: Reduce = reduce
        self._capacity = capacity
        self._size = 1  # samples in a full bucket
        self._xs: list[float] = []
        self._ys: list[float] = []
        self._open: list[float] | None = None  # samples, sum of x, reduced y

    def add(self, x: float, y: float) -> None:
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        if len(self._xs) == self._capacity:
            self._merge()
        self.count += 1
        if self._open is None:
            self._open = [1, x, y]
        else:
            samples, sum_x, reduced = self._open
            self._open = [samples + 1, sum_x + x, self._join(reduced, y)]
        if self._open[0] == self._size:
            x_mean, y_reduced = self._value(self._open)
            self._xs.append(x_mean)
            self._ys.append(y_reduced)
            self._open = None

    def points(self) -> tuple[list[float], list[float]]:
        if self._open is None:
            return self._xs, self._ys
        x, y = self._value(self._open)
        return [*self._xs, x], [*self._ys, y]

    def _join(self, a: float, b: float) -> float:
        return a + b if self._reduce == "mean" else max(a, b) if self._reduce == "max" else min(a, b)

    def _value(self, bucket: list[float]) -> tuple[float, float]:
        samples, sum_x, reduced = bucket
        y = reduced / samples if self._reduce == "mean" else reduced
        return _short(sum_x / samples), _short(y)

    def _merge(self) -> None:
        halve = 0.5 if self._reduce == "mean" else 1.0
        pairs = range(0, self._capacity, 2)
        self._ys = [_short(halve * self._join(self._ys[i], self._ys[i + 1])) for i in pairs]
        self._xs = [_short((self._xs[i] + self._xs[i + 1]) / 2) for i in pairs]
        self._size *= 2


def _short(value: float) -> float:
    # Eight digits are more than a screen shows; full precision would double what is sent to the browser.
    return float(f"{value:.8g}")


MARK_EVERY = 100  # episodes between the notebook's marks of average, max and min


def layout_of(record: Mapping[str, Any], frames_per_step: int) -> Layout:
    """The charts of a run's agent; those that every agent has where the settings cannot be read."""
    try:
        config = from_dict(record.get("config", {}))
    except UserError:
        return Layout((SCORE, speed_chart(frames_per_step), BUFFER))
    layout = entry_of(config).charts(config, frames_per_step)
    if config.eval_every == 0:
        return layout
    with_evaluations = (
        replace(chart, lines=(*chart.lines, EVALUATION)) if chart.key == SCORE.key else chart for chart in layout.charts
    )
    return replace(layout, charts=tuple(with_evaluations))


class Board:
    """The charts of one run and what they hold so far.

    Args:
        record: what config.json holds, or as much of it as there is.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._frames_per_step = int(record.get("frames_per_step", 1))
        layout = layout_of(record, self._frames_per_step)
        self.charts, self._by_episode = layout.charts, layout.x == "episodes"
        self._games: list[float] = []  # scores since the last mark
        self._episode = -1
        frames = "frames" if self._frames_per_step > 1 else "environment steps"
        self.xlabel = "episodes" if self._by_episode else frames
        self.traces = {(chart.key, line.name): Trace(line.reduce) for chart in self.charts for line in chart.lines}

    def add(self, source: str, row: Row) -> None:
        """Take a row of `metrics`, `episodes` or `evaluations`; cells may be missing or NaN."""
        if source == "episodes":
            self._episode += 1
        if not self._by_episode:
            return self._plot(source, row.get("global_step", math.nan) * self._frames_per_step, row)
        self._plot(source, self._episode if source == "episodes" else row.get("episodes", math.nan), row)
        if source == "episodes":
            self._mark(row.get("episodic_return", math.nan))
        return None

    def _mark(self, score: float) -> None:
        self._games.append(score)
        if self._episode % MARK_EVERY == 0:
            games, self._games = self._games, []
            marks = {"average": math.fsum(games) / len(games), "max": max(games), "min": min(games)}
            self._plot("marks", self._episode, marks)

    def _plot(self, source: str, x: float, row: Row) -> None:
        for chart in self.charts:
            for line in chart.lines:
                if line.source == source:
                    self.traces[chart.key, line.name].add(x, line.scale * row.get(line.column, math.nan))

    def revision(self, chart: Chart) -> int:
        """Grows with every sample of the chart."""
        return sum(self.traces[chart.key, line.name].count for line in chart.lines)

    def pane(self, chart: Chart) -> Pane:
        """The whole window as Visdom takes it."""
        data = [self._curve(line, *self.traces[chart.key, line.name].points()) for line in chart.lines]
        grid = {"gridcolor": "#E5E5E5", "zerolinecolor": "#C8C8C8", "automargin": True}
        yaxis = {"title": {"text": chart.ylabel}, **grid, **(chart.yaxis or {})}
        if yaxis.get("type") == "log":
            yaxis |= log_axis(y for trace in data for y in trace["y"])
        layout: Pane = {
            "showlegend": len(chart.lines) > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
            # At the left, where neither the toolbar nor the legend below it reaches.
            "title": {"text": f"<b>{chart.title}</b>", "x": 0.02, "y": 0.97, "yanchor": "top", "font": {"size": 14}},
            "margin": {"l": 58, "r": 14, "t": 54, "b": 42},
            "xaxis": {"title": {"text": self.xlabel}, "rangemode": "tozero", **grid},
            "yaxis": yaxis,
            "font": {"size": 12},
            "uirevision": "kept",  # a person's zoom and hidden traces outlive the next drawing
        }
        if not any(trace["x"] for trace in data):
            empty = nothing_yet(chart.empty)
            layout |= {**empty, "xaxis": {**layout["xaxis"], **empty["xaxis"]}}  # its title tells what it counts
        return {"data": data, "win": chart.key, "layout": layout, "opts": options(chart.title)}

    def _curve(self, line: Line, xs: list[float], ys: list[float]) -> Pane:
        # One point makes no line: show it as a dot until there is a second.
        mode = "markers" if len(xs) < 2 else "lines+markers" if line.markers else "lines"
        curve: Pane = {"type": "scatter", "name": line.name, "x": xs, "y": ys, "line": line.style, "mode": mode}
        return curve | {"marker": {"color": line.color, "size": 6}}
