"""The loop's timer: where the time goes."""

import pytest

from gravitar_dqn import loop
from gravitar_dqn.loop import Timer


def test_a_timer_adds_up_the_time_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 2.0, 5.0, 5.0, 6.0])
    waited = []
    timer = Timer(lambda: waited.append(1))
    with monkeypatch.context() as patched:
        patched.setattr(loop.time, "perf_counter", lambda: next(now))
        for name in ("act", "learn", "act"):
            with timer(name):
                pass
    assert timer.seconds == {"act": 3.0, "learn": 3.0} and len(waited) == 3
    title, *lines = timer.table(1_000).splitlines()
    assert title == "where the time went, 1000 steps:"
    assert [line.split() for line in lines] == [
        ["act", "3.00", "s", "50.0%", "3000.0", "us", "a", "step"],
        ["learn", "3.00", "s", "50.0%", "3000.0", "us", "a", "step"],
    ]


def test_a_block_that_fails_is_counted_too() -> None:
    timer = Timer()
    with pytest.raises(KeyError), timer("act"):
        raise KeyError
    assert timer.seconds["act"] >= 0
