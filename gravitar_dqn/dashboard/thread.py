"""The live dashboard: a thread that follows the files of a run's folder and draws them on a Visdom server.

Training knows nothing of it: it appends to CSV files, and this thread reads them. So a server that is down, slow or
hung costs training nothing, and one that was restarted is simply sent everything again.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from gravitar_dqn.dashboard.connection import Drawer
from gravitar_dqn.dashboard.registry import register
from gravitar_dqn.dashboard.view import RunView

log = logging.getLogger(__name__)

LONGEST_PAUSE = 10.0  # seconds


class Dashboard:
    """Draws a run's folder on a Visdom server from a thread of its own, for the process that trains in it.

    Writes to one Visdom environment, `environment`, and never to another's; `url` is its page. `period` is the least
    time between two drawings, in seconds.
    """

    def __init__(self, run_dir: Path, server: str, *, video_dir: Path | None = None, period: float = 1.0) -> None:
        self._view = RunView(run_dir, video_dir)
        self._drawer = Drawer(server)
        self.environment = self._view.environment
        self.url = self._drawer.url(self.environment)
        self._run_dir = run_dir
        self._period = period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._answered = False

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 3.0) -> None:
        """Draw once more if the server answers; back within `timeout` seconds in any case."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._drawer.hang_up()

    def _run(self) -> None:
        failures = 0
        last = False
        while not last:
            last = self._stop.is_set()  # looked at before reading, so that the last drawing has all rows
            started = time.monotonic()
            try:
                # At the end our own process still holds the run's lock, and the page must say that it has ended.
                self._view.update(running=not last)
                self._drawer.draw(self.environment, self._view.windows())
                if last:  # a finished run outlives the server's memory
                    self._drawer.save(self.environment)
                if not self._answered:
                    register(self._run_dir)
                self._answered = True
                failures = 0
            except Exception as error:  # whatever it is, training goes on and the next attempt starts clean
                failures += 1
                self._drawer.forget()
                self._complain(failures, error)
            self._stop.wait(0 if last else pause(self._period, failures, time.monotonic() - started))
        self._drawer.forget()

    def _complain(self, failures: int, error: Exception) -> None:
        # Once, and only if nothing was ever drawn: a server that is just starting up is no news, nor is one that went.
        if failures == 4 and not self._answered:
            log.warning("the dashboard is not drawn yet: %s: %s", self._drawer.server, error or repr(error))


def pause(period: float, failures: int, took: float) -> float:
    """Seconds until the next drawing, which gets a twentieth of the time at most; failures double the wait."""
    wait = max(period, 20 * took) if failures == 0 else period * 2 ** min(failures - 1, 10)
    return min(wait, LONGEST_PAUSE)
