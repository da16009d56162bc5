"""The charts of a run's page, as data: which columns of its CSV files are drawn, how, and in which order.

A chart is drawn when the run's agent measures one of its columns, or one has a value. Agents know nothing of it: a
column that is named nowhere here gets a plain chart of its own, but on the notebook's page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reduce = Literal["mean", "max", "min"]

# Okabe and Ito's palette, told apart by colour-blind people too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LIGHT_BLUE, PURPLE = "#9CC9E5", "#CC79A7"


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
    empty: str = ""  # shown where there is no data yet: when there will be; "": when learning begins


def lines(columns: Mapping[str, str]) -> tuple[Line, ...]:
    """A line for each name and its column of metrics.csv, told apart by their colours."""
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    return tuple(Line(name, column, color) for (name, column), color in zip(columns.items(), colors, strict=False))


NO_GAME, NO_BONUS = "drawn when the first game ends", "drawn when the predictor has had its first gradient steps"
FIRST_ROW = "drawn from the first row of metrics.csv on"
TO_ZERO = {"rangemode": "tozero"}
LOG = {"type": "log", "exponentformat": "power"}
EVALUATION = Line("evaluation", "mean", PURPLE, source="evaluations", markers=True)
SCORE = (
    Line("game", "episodic_return", LIGHT_BLUE, source="episodes"),
    Line("average of 100", "return_mean", BLUE),
    Line("max", "return_max", ORANGE, reduce="max"),
    Line("min", "return_min", GREEN, reduce="min"),
    EVALUATION,
)
BONUS = (Line("mean", "int_reward_mean"), Line("max", "int_reward_max", ORANGE, reduce="max"))
INT_RETURN = lines({"mean": "int_return_mean"})
LOSS = lines({"TD": "td_loss", "RND predictor": "rnd_loss", "reward prediction": "reward_prediction_loss"})
VALUE_LOSS = lines({"score": "value_loss_ext", "bonus": "value_loss_int"})
REPLAYED = lines({"pixel control": "pixel_control_loss", "value replay": "value_replay_loss"})
CHANGE = lines({"KL": "approx_kl", "clipped share": "clip_fraction"})
EXPLAINED = lines({"score": "explained_variance_ext", "bonus": "explained_variance_int"})
FILL = (Line("fill", "buffer_fill", scale=100),)


def charts(frames_per_step: int) -> tuple[Chart, ...]:
    """All charts by frames, or by steps where there is no emulator, in the order of the page."""
    unit = "frames/s" if frames_per_step > 1 else "steps/s"
    acting = Line(f"{unit} acting", "sps", scale=frames_per_step)
    speed = (acting, Line("samples/s learning", "samples_per_second", ORANGE))
    return (
        Chart("score", "Score", "score", SCORE, empty=NO_GAME),
        Chart("int_reward", "Reward, intrinsic", "bonus (log)", BONUS, LOG, NO_BONUS),
        Chart("int_return", "Return, intrinsic", "discounted return", INT_RETURN, None, NO_BONUS),
        Chart("policy_loss", "Policy loss", "loss", lines({"loss": "policy_loss"})),
        Chart("value_loss", "Value losses", "loss (log)", VALUE_LOSS, LOG),
        Chart("loss", "Loss", "loss (log)", LOSS, LOG),
        Chart("replayed", "Replayed losses", "loss (log)", REPLAYED, LOG),
        Chart("q_mean", "Expected return", "mean Q", lines({"mean Q": "q_mean"})),
        Chart("entropy", "Entropy", "entropy", lines({"entropy": "entropy"}), TO_ZERO),
        Chart("change", "Change of the policy", "KL divergence, share", CHANGE, TO_ZERO),
        Chart("explained", "Explained variance", "share", EXPLAINED, {"range": [-1, 1.05]}),
        Chart("epsilon", "Epsilon", "epsilon", lines({"epsilon": "epsilon"}), TO_ZERO, FIRST_ROW),
        Chart("speed", "Speed", "per second", speed, TO_ZERO, FIRST_ROW),
        Chart("buffer", "Replay buffer", "fill (%)", FILL, {"range": [0, 105]}, FIRST_ROW),
    )


ALWAYS = set("return_mean return_min return_max sps samples_per_second buffer_fill".split())  # measured in every run
NOT_DRAWN = set("wall_seconds global_step frames num_updates episodes learning_rate".split())  # columns without a chart

# The notebook's page, by episodes. Marks are made of every 100 games.
NOTEBOOK_SCORE = (
    Line("val", "episodic_return", LIGHT_BLUE, source="episodes"),
    Line("average", "average", source="marks"),
    Line("max", "max", ORANGE, source="marks", reduce="max"),
    Line("min", "min", GREEN, source="marks", reduce="min"),
    EVALUATION,
)
NOTEBOOK = (
    Chart("score", "Score", "score", NOTEBOOK_SCORE, empty=NO_GAME),
    Chart("int_reward", "Average Intrinsic Reward", "bonus", lines({"average": "int_reward_mean"}), None, NO_BONUS),
    Chart("epsilon", "Epsilon", "epsilon", lines({"epsilon": "epsilon"}), None, FIRST_ROW),
    Chart("rnd_loss", "RND Loss", "loss", lines({"loss": "rnd_loss"})),
    Chart("loss", "Network Loss", "loss", lines({"loss": "td_loss"})),
    Chart("q_mean", "Expected Return", "mean Q", lines({"value": "q_mean"})),
)
