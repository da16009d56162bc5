"""Measured rows: in alternation, as medians, quartiles and ratios."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Row:
    """One line of the table: a quantity measured once a round."""

    section: str
    name: str
    unit: str
    values: list[float]
    against: list[float] = field(default_factory=list)  # the reference's values, round by round

    @property
    def ratios(self) -> list[float]:
        """How many times better than the reference, round by round. Speeds are better when higher, times when lower."""
        pairs = zip(self.values, self.against, strict=True) if self.against else []
        return [value / other if "/s" in self.unit else other / value for value, other in pairs]

    def summary(self) -> dict[str, Any]:
        """Median and quartiles of the values and of the ratios."""
        summary = {"section": self.section, "name": self.name, "unit": self.unit, **spread(self.values)}
        return summary | {f"ratio_{key}": value for key, value in spread(self.ratios).items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile; nothing of no values."""
    if not values:
        return {}
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}


def milliseconds(functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 5) -> dict[str, list[float]]:
    """The time of one call of each function, a mean over `calls`. The functions take turns, `rounds` times over."""
    threads = torch.get_num_threads()  # Timer's own default is one
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in functions.items()}
    for timer in timers.values():
        timer.timeit(5)  # a CUDA graph is captured at the fourth call; later Timer itself makes two before it measures
    values: dict[str, list[float]] = {name: [] for name in functions}
    for _, (name, timer) in itertools.product(range(rounds), timers.items()):
        values[name].append(1e3 * timer.timeit(calls).median)
    return values


def rows_of(section: str, unit: str, values: Mapping[str, list[float]], reference: str) -> list[Row]:
    """A row for each name; the ratios are against `reference`."""
    against = values[reference]
    return [Row(section, name, unit, mine, [] if name == reference else against) for name, mine in values.items()]


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
