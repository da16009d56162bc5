"""What the dashboard can draw: lines, charts, and those that several agents have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Reduce = Literal["mean", "max", "min"]

# Okabe and Ito's palette, told apart by colour-blind people too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LIGHT_BLUE, PURPLE = "#9CC9E5", "#CC79A7"

FIRST_ROW = "drawn from the first row of metrics.csv on"


@dataclass(frozen=True)
class Line:
    """One trace of a chart: a column of one of the sources, `metrics`, `episodes`, `evaluations` or `marks`."""

    name: str
    column: str
    color: str = BLUE
    source: str = "metrics"
    reduce: Reduce = "mean"
    scale: float = 1.0
    markers: bool = False  # a marker at every point

    @property
    def compared(self) -> bool:
        """Whether it is drawn beside other runs' too: single games and extremes would hide the rest."""
        return self.reduce == "mean" and self.source != "episodes"

    @property
    def style(self) -> dict[str, object]:
        """As Plotly takes it."""
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
    empty: str = FIRST_ROW  # said where there is no data yet: when there will be


@dataclass(frozen=True)
class Layout:
    """The charts of an agent, and what their x axis counts."""

    charts: tuple[Chart, ...]
    x: Literal["frames", "episodes"] = "frames"


OF_CURIOSITY = {"int_reward_mean", "int_reward_max", "rnd_loss"}  # columns
TO_ZERO = {"rangemode": "tozero"}
LOG = {"type": "log", "exponentformat": "power"}
NO_GAME, NO_BONUS = "drawn when the first game ends", "drawn when the predictor has had its first gradient steps"
SCORE = Chart(
    "score",
    "Score",
    "score",
    (
        Line("game", "episodic_return", LIGHT_BLUE, source="episodes"),
        Line("average of 100", "return_mean", BLUE),
        Line("max", "return_max", ORANGE, reduce="max"),
        Line("min", "return_min", GREEN, reduce="min"),
    ),
    empty=NO_GAME,
)
EVALUATION = Line("evaluation", "mean", PURPLE, source="evaluations", markers=True)
INT_REWARD = Chart(
    "int_reward",
    "Reward, intrinsic",
    "bonus (log)",
    (Line("mean", "int_reward_mean"), Line("max", "int_reward_max", ORANGE, reduce="max")),
    LOG,
    NO_BONUS,
)
EPSILON = Chart("epsilon", "Epsilon", "epsilon", (Line("epsilon", "epsilon"),), TO_ZERO)
BUFFER = Chart("buffer", "Replay buffer", "fill (%)", (Line("fill", "buffer_fill", scale=100),), {"range": [0, 105]})


def without(charts: Iterable[Chart], columns: Collection[str]) -> tuple[Chart, ...]:
    """The charts less the lines of columns that can have no data, and less those that have no line then."""
    kept = [replace(chart, lines=tuple(line for line in chart.lines if line.column not in columns)) for chart in charts]
    return tuple(chart for chart in kept if chart.lines)


def learning_starts(steps: int) -> str:
    """What a chart of learning says before there is any."""
    return f"learning begins after {steps:,} steps"


def speed_chart(frames_per_step: int) -> Chart:
    """Emulator frames, or steps where there is no emulator, and samples learned."""
    unit = "frames/s" if frames_per_step > 1 else "steps/s"
    acting = Line(f"{unit} acting", "sps", scale=frames_per_step)
    return Chart(
        "speed", "Speed", "per second", (acting, Line("samples/s learning", "samples_per_second", ORANGE)), TO_ZERO
    )
