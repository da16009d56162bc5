"""The charts of a run: from the rows of its CSV files to Visdom's windows. Touches no file and no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from gravitar_dqn.dashboard.charts import ALWAYS, NOT_DRAWN, NOTEBOOK, Chart, Line, Reduce, charts
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


class Board:
    """The charts of one run and what they hold so far.

    Args:
        record: what config.json holds, or as much of it as there is.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._frames_per_step = int(record.get("frames_per_step", 1))
        self._by_episode, self._no_learning = False, "drawn when learning begins"
        with suppress(UserError):  # settings of another version
            config = from_dict(record.get("config", {}))
            self._by_episode = config.counts_episodes
            self._no_learning = f"learning begins after {config.first_update:,} steps"
        named = record.get("metrics")
        self._measured = ALWAYS | {*map(str, named if isinstance(named, list) else ())}  # have values, or will
        self._charts = list(NOTEBOOK if self._by_episode else charts(self._frames_per_step))
        self._games: list[float] = []  # scores since the last mark
        self._episode = -1
        frames = "frames" if self._frames_per_step > 1 else "environment steps"
        self.xlabel = "episodes" if self._by_episode else frames
        self.traces = {(chart.key, line.name): Trace(line.reduce) for chart in self._charts for line in chart.lines}

    @property
    def charts(self) -> list[Chart]:
        """The charts with the lines that have data, or will."""
        drawn = ((chart, tuple(line for line in chart.lines if self._is_drawn(chart, line))) for chart in self._charts)
        return [replace(chart, lines=lines) for chart, lines in drawn if lines]

    def _is_drawn(self, chart: Chart, line: Line) -> bool:
        will_have = line.source in ("episodes", "marks") or (line.source == "metrics" and line.column in self._measured)
        return will_have or self.traces[chart.key, line.name].count > 0

    def add(self, source: str, row: Row) -> None:
        """Take a row of `metrics`, `episodes` or `evaluations`; cells may be missing or NaN."""
        if source == "episodes":
            self._episode += 1
        if source == "metrics" and not self._by_episode:
            self._add_charts(row)
        if not self._by_episode:
            return self._plot(source, row.get("global_step", math.nan) * self._frames_per_step, row)
        self._plot(source, self._episode if source == "episodes" else row.get("episodes", math.nan), row)
        if source == "episodes":
            self._mark(row.get("episodic_return", math.nan))
        return None

    def _add_charts(self, row: Row) -> None:
        """A plain chart for every column with a value that no chart has."""
        known = NOT_DRAWN | {line.column for chart in self._charts for line in chart.lines}
        for column in [name for name, value in row.items() if name not in known and math.isfinite(value)]:
            self._charts.append(Chart(column, column, "", (Line(column, column),)))
            self.traces[column, column] = Trace()

    def _mark(self, score: float) -> None:
        self._games.append(score)
        if self._episode % MARK_EVERY == 0:
            games, self._games = self._games, []
            marks = {"average": math.fsum(games) / len(games), "max": max(games), "min": min(games)}
            self._plot("marks", self._episode, marks)

    def _plot(self, source: str, x: float, row: Row) -> None:
        for chart in self._charts:
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
            empty = nothing_yet(chart.empty or self._no_learning)
            layout |= {**empty, "xaxis": {**layout["xaxis"], **empty["xaxis"]}}  # its title tells what it counts
        return {"data": data, "win": chart.key, "layout": layout, "opts": options(chart.title)}

    def _curve(self, line: Line, xs: list[float], ys: list[float]) -> Pane:
        # One point makes no line: show it as a dot until there is a second.
        mode = "markers" if len(xs) < 2 else "lines+markers" if line.markers else "lines"
        curve: Pane = {"type": "scatter", "name": line.name, "x": xs, "y": ys, "line": line.style, "mode": mode}
        return curve | {"marker": {"color": line.color, "size": 6}}
