"""What holds for all tests.

One torch thread for them and what they start: networks are small, and threads that wait for each other crawl on a busy
machine. No deadline for a single example either, for the same reason. And Ctrl-C works in what they start, also where
the shell that started the tests has it ignored, as it does for a job in the background.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import INJECTED
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
signal.signal(signal.SIGINT, signal.default_int_handler)

REPORTED: Counter[str] = Counter()  # of all processes that run tests


@pytest.fixture(autouse=True)
def _count_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test's faults go into its report, which reaches the process that prints the end."""
    before = INJECTED.copy()
    yield
    if found := INJECTED - before:
        request.node.user_properties.append(("faults", dict(found)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A Visdom server of the package's, in a process of its own."""
    from visdom_helpers import Server, pretend_prepared  # not for the many tests without it

    pretend_prepared(tmp_path / "cache")
    server = Server(tmp_path / "cache")
    server.start()
    yield server
    server.kill()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what the reports say."""
    if report.when == "teardown":
        REPORTED.update(dict(report.user_properties).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults were injected, by kind."""
    if REPORTED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in REPORTED.most_common())
        terminalreporter.write_line(f"{REPORTED.total()} faults injected: {kinds}")
