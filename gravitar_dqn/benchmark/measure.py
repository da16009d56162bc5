"""Measured rows: in alternation, as medians, quartiles and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """One line of the table: a quantity measured once a round."""

    section: str
    name: str
    unit: str
    values: list[float]
    against: list[float] = field(default_factory=list)  # the reference's values, round by round
    higher_is_better: bool = False

    @property
    def ratios(self) -> list[float]:
        """How many times better than the reference, round by round."""
        pairs = zip(self.values, self.against, strict=True) if self.against else []
        return [value / other if self.higher_is_better else other / value for value, other in pairs]

    def summary(self) -> dict[str, Any]:
        """Median and quartiles of the values and of the ratios."""
        summary = {"section": self.section, "name": self.name, "unit": self.unit, **spread(self.values)}
        return summary | {f"ratio_{key}": value for key, value in spread(self.ratios).items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile; nothing of no values."""
    if not values:
        return {}
    low, high = np.percentile(values, [25, 75]).tolist()
    return {"median": statistics.median(values), "low": low, "high": high}


def alternate(
    candidates: Mapping[str, Callable[[], float]], rounds: int, before_round: Callable[[int], object] = lambda _: None
) -> dict[str, list[float]]:
    """Call each in turn, `rounds` times over; what they return, by name. `before_round` gets the round's number."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        before_round(i)
        for name, candidate in candidates.items():
            values[name].append(candidate())
    return values


def milliseconds(function: Callable[[], object], device: torch.device, repeat: int = 5) -> Callable[[], float]:
    """A function that returns the time of one call of `function`, averaged over `repeat`."""

    def measure() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        wait(device)
        return 1e3 * (time.perf_counter() - start) / repeat

    for _ in range(5):  # warm up; a CUDA graph is captured at the fourth call
        function()
    return measure


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(
    section: str, unit: str, values: Mapping[str, list[float]], reference: str, *, higher_is_better: bool = False
) -> list[Row]:
    """A row for each name; the ratios are against `reference`."""
    against = values[reference]
    return [
        Row(section, name, unit, mine, [] if name == reference else against, higher_is_better)
        for name, mine in values.items()
    ]


def table(rows: list[Row]) -> str:
    """The figures for people."""
    lines, section = [], ""
    width = max(len(row.name) for row in rows)
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"{section} ({row.unit})", f"  {'':{width}s} {'median':>10s}  {'quartiles':>19s}    ratio"]
        summary = row.summary()
        line = f"  {row.name:{width}s} {summary['median']:10.4g}  {summary['low']:8.4g} - {summary['high']:8.4g}"
        if row.ratios:
            line += f"    {summary['ratio_median']:.2f}x ({summary['ratio_low']:.2f} - {summary['ratio_high']:.2f})"
        lines.append(line)
    return "\n".join(lines)
