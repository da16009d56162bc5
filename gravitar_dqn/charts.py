"""What the dashboard can draw: lines, charts, and those that several agents have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reduce = Literal["mean", "max", "min"]

# Okabe and Ito's palette, told apart by colour-blind people too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LIGHT_BLUE = "#9CC9E5"


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


@dataclass(frozen=True)
class Layout:
    """The charts of an agent, and what their x axis counts."""

    charts: tuple[Chart, ...]
    x: Literal["frames", "episodes"] = "frames"


TO_ZERO = {"rangemode": "tozero"}
LOG = {"type": "log", "exponentformat": "power"}
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
)
INT_REWARD = Chart(
    "int_reward",
    "Reward, intrinsic",
    "bonus (log)",
    (Line("mean", "int_reward_mean"), Line("max", "int_reward_max", ORANGE, reduce="max")),
    LOG,
)
EPSILON = Chart("epsilon", "Epsilon", "epsilon", (Line("epsilon", "epsilon"),), TO_ZERO)
BUFFER = Chart("buffer", "Replay buffer", "fill (%)", (Line("fill", "buffer_fill", scale=100),), {"range": [0, 105]})


def speed_chart(frames_per_step: int) -> Chart:
    """Emulator frames, or steps where there is no emulator, and samples learned."""
    unit = "frames/s" if frames_per_step > 1 else "steps/s"
    acting = Line(f"{unit} acting", "sps", scale=frames_per_step)
    return Chart(
        "speed", "Speed", "per second", (acting, Line("samples/s learning", "samples_per_second", ORANGE)), TO_ZERO
    )
