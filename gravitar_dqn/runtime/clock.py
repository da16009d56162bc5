"""Whether it is time for what a run does now and then."""

from __future__ import annotations


class Every:
    """Says when a period has passed, in what the caller counts: agent steps, seconds. A period of 0 never has.

    Args:
        period: from one time to the next. They are its multiples, wherever a session began; what was missed is not
            made up for.
        now: the count at the beginning.
    """

    def __init__(self, period: float, now: float = 0) -> None:
        self._period, self._next = period, now
        self.due(now)

    def due(self, now: float) -> bool:
        """Whether to act now; true once a period."""
        if self._period == 0 or now < self._next:
            return False
        self._next = (now // self._period + 1) * self._period
        return True
