"""What holds for all tests.

One torch thread for them and what they start: networks are small, and threads that wait for each other crawl on a busy
machine. No deadline for a single example either, for the same reason. And Ctrl-C works in what they start, also where
the shell that started the tests has it ignored, as it does for a job in the background.
"""

import os
import signal

import pytest
from faults import INJECTED
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults were injected, by kind."""
    if INJECTED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in INJECTED.most_common())
        terminalreporter.write_line(f"{INJECTED.total()} faults injected: {kinds}")
