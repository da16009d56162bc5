"""What the dashboard shows: from the rows of a run's CSV files to Visdom's windows. Touches no file and no server."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gravitar_dqn.config import flatten

Row = Mapping[str, float]
Pane = dict[str, Any]
Reduce = Literal["mean", "max", "min"]

CAPACITY = 600  # most points of a trace
WIDTH, HEIGHT = 400, 300  # pixels of a window; three columns in a page 1280 wide

# Okabe and Ito's palette, told apart by colour-blind people too.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A8A"


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


@dataclass(frozen=True)
class Line:
    """One trace of a chart: a column of one of the sources, `metrics`, `episodes` or `marks`."""

    name: str
    column: str
    color: str = BLUE
    source: str = "metrics"
    reduce: Reduce = "mean"
    scale: float = 1.0

    @property
    def style(self) -> Pane:
        dash = {"mean": "solid", "max": "dash", "min": "dot"}[self.reduce]
        return {"color": self.color, "dash": dash, "width": 2 if self.reduce == "mean" else 1.5}


@dataclass(frozen=True)
class Chart:
    """One plot window."""

    key: str
    title: str
    ylabel: str
    lines: tuple[Line, ...]
    yaxis: Mapping[str, object] | None = None


TO_ZERO = {"rangemode": "tozero"}
LOG = {"type": "log", "exponentformat": "power"}
SCORE = Chart(
    "score",
    "Score",
    "score",
    (
        Line("game", "episodic_return", "#9CC9E5", source="episodes"),
        Line("average of 100", "return_mean", BLUE),
        Line("max", "return_max", ORANGE, reduce="max"),
        Line("min", "return_min", GREEN, reduce="min"),
    ),
)
INT_REWARD = Chart(
    "int_reward",
    "Reward, intrinsic",
    "bonus (log)",
    (Line("mean", "int_reward_mean"), Line("max", "int_reward_max", ORANGE, reduce="max")),
    LOG,
)
BUFFER = Chart("buffer", "Replay buffer", "fill (%)", (Line("fill", "buffer_fill", scale=100),), {"range": [0, 105]})


def speed_chart(unit: str, scale: float) -> Chart:
    """Steps played, in `unit`, and samples learned."""
    rates = (Line(f"{unit} acting", "sps", scale=scale), Line("samples/s learning", "samples_per_second", ORANGE))
    return Chart("speed", "Speed", "per second", rates, TO_ZERO)


def dqn_charts(speed: Chart) -> tuple[Chart, ...]:
    """The charts of DQN's presets but `notebook`."""
    loss = (Line("TD", "td_loss"), Line("RND predictor", "rnd_loss", ORANGE))
    return (
        SCORE,
        INT_REWARD,
        Chart("loss", "Loss", "loss (log)", loss, LOG),
        Chart("q_mean", "Expected return", "mean Q", (Line("mean Q", "q_mean"),)),
        Chart("epsilon", "Epsilon", "epsilon", (Line("epsilon", "epsilon"),), TO_ZERO),
        speed,
        BUFFER,
    )


def randal_charts(speed: Chart) -> tuple[Chart, ...]:
    """The charts of RANDAL's presets."""
    values = (Line("score", "value_loss_ext"), Line("bonus", "value_loss_int", ORANGE))
    predicted = (Line("RND predictor", "rnd_loss"), Line("reward prediction", "reward_prediction_loss", ORANGE))
    replayed = (Line("pixel control", "pixel_control_loss"), Line("value replay", "value_replay_loss", ORANGE))
    explained = (Line("score", "explained_variance_ext"), Line("bonus", "explained_variance_int", ORANGE))
    change = (Line("KL", "approx_kl"), Line("clipped share", "clip_fraction", ORANGE))
    return (
        SCORE,
        INT_REWARD,
        Chart("int_return", "Return, intrinsic", "discounted return", (Line("mean", "int_return_mean"),)),
        Chart("policy_loss", "Policy loss", "loss", (Line("loss", "policy_loss"),)),
        Chart("value_loss", "Value losses", "loss (log)", values, LOG),
        Chart("predicted", "Prediction losses", "loss (log)", predicted, LOG),
        Chart("replayed", "Replayed losses", "loss (log)", replayed, LOG),
        Chart("entropy", "Entropy", "entropy", (Line("entropy", "entropy"),), TO_ZERO),
        Chart("change", "Change of the policy", "KL divergence, share", change, TO_ZERO),
        Chart("explained", "Explained variance", "share", explained, {"range": [-1, 1.05]}),
        speed,
        BUFFER,
    )


NOTEBOOK_CHARTS: tuple[Chart, ...] = (
    Chart(
        "score",
        "Score",
        "score",
        (
            Line("val", "episodic_return", "#9CC9E5", source="episodes"),
            Line("average", "average", BLUE, source="marks"),
            Line("max", "max", ORANGE, source="marks", reduce="max"),
            Line("min", "min", GREEN, source="marks", reduce="min"),
        ),
    ),
    Chart("int_reward", "Average Intrinsic Reward", "bonus", (Line("average", "int_reward_mean"),)),
    Chart("epsilon", "Epsilon", "epsilon", (Line("epsilon", "epsilon"),)),
    Chart("rnd_loss", "RND Loss", "loss", (Line("loss", "rnd_loss"),)),
    Chart("loss", "Network Loss", "loss", (Line("loss", "td_loss"),)),
    Chart("q_mean", "Expected Return", "mean Q", (Line("value", "q_mean"),)),
)
MARK_EVERY = 100  # episodes between the notebook's marks of average, max and min


class Board:
    """The charts of one run and what they hold so far."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        flat = flatten(settings)
        environment = str(flat.get("config.env.id", "ALE/"))
        atari = environment.startswith("ALE/")
        self._notebook = settings.get("preset") == "notebook"
        self._x_scale = 4 if atari else 1  # frames in a step
        self._games: list[float] = []  # scores since the last mark
        self._episode = -1
        if self._notebook:
            self.charts, self.xlabel = NOTEBOOK_CHARTS, "episodes"
        else:
            charts = randal_charts if "config.agent.num_steps" in flat else dqn_charts
            self.charts = charts(speed_chart("frames/s" if atari else "steps/s", self._x_scale))
            self.xlabel = "frames" if atari else "environment steps"
        self.traces = {(chart.key, line.name): Trace(line.reduce) for chart in self.charts for line in chart.lines}

    def add(self, source: str, row: Row) -> None:
        """Take a row of `metrics` or `episodes`; cells may be missing or NaN."""
        if source == "episodes":
            self._episode += 1
        if not self._notebook:
            return self._plot(source, row.get("global_step", math.nan) * self._x_scale, row)
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
        data: list[Pane] = []
        for line in chart.lines:
            xs, ys = self.traces[chart.key, line.name].points()
            trace: Pane = {"type": "scatter", "name": line.name, "x": xs, "y": ys, "line": line.style}
            # One point makes no line: show it as a dot until there is a second.
            trace |= {"mode": "lines" if len(xs) > 1 else "markers", "marker": {"color": line.color, "size": 6}}
            data.append(trace)
        grid = {"gridcolor": "#E5E5E5", "zerolinecolor": "#C8C8C8", "automargin": True}
        layout = {
            "showlegend": len(chart.lines) > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
            # At the left, where neither the toolbar nor the legend below it reaches.
            "title": {"text": f"<b>{chart.title}</b>", "x": 0.02, "y": 0.97, "yanchor": "top", "font": {"size": 14}},
            "margin": {"l": 58, "r": 14, "t": 54, "b": 42},
            "xaxis": {"title": {"text": self.xlabel}, "rangemode": "tozero", **grid},
            "yaxis": {"title": {"text": chart.ylabel}, **grid, **(chart.yaxis or {})},
            "font": {"size": 12},
            "uirevision": "kept",  # a person's zoom and hidden traces outlive the next drawing
        }
        return {"data": data, "win": chart.key, "layout": layout, "opts": options(chart.title)}


def options(title: str) -> Pane:
    return {"title": title, "width": WIDTH, "height": HEIGHT}


def text_pane(key: str, title: str, content: str) -> Pane:
    boxed = f"<div style='padding:4px 10px;color:#333'>{content}</div>"
    return {"data": [{"type": "text", "content": boxed}], "win": key, "layout": {}, "opts": options(title)}


def video_pane(caption: str, mp4: bytes | None) -> Pane:
    """The last recorded game, playing; a placeholder that keeps the window's place until there is one."""
    if mp4 is None:
        return text_pane("video", "Last recorded game", "<i>no game has been recorded yet</i>")
    source = f"data:video/mp4;base64,{base64.b64encode(mp4).decode('ascii')}"
    # Muted, because browsers start nothing else by themselves.
    player = (
        f'<video muted autoplay loop controls playsinline style="width:100%;max-height:235px" src="{source}"></video>'
    )
    return text_pane("video", "Last recorded game", f"{player}<div>{html.escape(caption)}</div>")


def settings_pane(settings: Mapping[str, Any]) -> Pane:
    """A table of config.json, the lines that tell one run from another first."""
    rows = flatten(settings)
    rows.pop("config.preset", None)  # the same as "preset"
    first: dict[str, Any] = {
        name: rows.pop(name) for name in ("preset", "config.seed", "device", "commit") if name in rows
    }
    cells = "".join(
        f"<tr><td style='padding-right:12px;color:#555'>{html.escape(name.removeprefix('config.'))}</td>"
        f"<td style='word-break:break-word'>{html.escape(str(value))}</td></tr>"
        for name, value in {**first, **rows}.items()
    )
    table = f"<table style='font-size:12px;line-height:1.35;vertical-align:top'>{cells}</table>"
    return text_pane("settings", "Settings", table if cells else "<i>config.json has not been written yet</i>")
