"""How many faults the tests marked `faults` injected, by kind; conftest prints them at the end."""

from collections import Counter

INJECTED: Counter[str] = Counter()


def injected(kind: str, count: int = 1) -> None:
    """Count a fault that a test has injected, and survived if the test passes."""
    INJECTED[kind] += count
