"""Whether it is time for what a run does now and then."""

from __future__ import annotations

import math


class Every:
    """Says when a period has passed, in what the caller counts: agent steps, seconds. A period of 0 never has.

    Args:
        period: from one time to the next. These are its multiples, wherever a session began; what was missed is not
            made up for.
        now: the count at the beginning.
    """

    def __init__(self, period: float, now: float = 0) -> None:
        self._period = period
        self._next = self._after(now)

    def _after(self, now: float) -> float:
        return (now // self._period + 1) * self._period if self._period else math.inf

    def due(self, now: float) -> bool:
        """Whether to act now. True is said once for each period."""
        if now < self._next:
            return False
        self._next = self._after(now)
        return True
