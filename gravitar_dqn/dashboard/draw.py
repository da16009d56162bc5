"""Drawing runs by their files, whoever trained them: finished ones, live ones, those without a dashboard."""

from __future__ import annotations

import http.client
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from gravitar_dqn.dashboard.compare import ComparisonView
from gravitar_dqn.dashboard.connection import Drawer
from gravitar_dqn.dashboard.panes import Window
from gravitar_dqn.dashboard.registry import register
from gravitar_dqn.dashboard.view import RunView
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.folder import load_run

SAVE_EVERY = 60.0  # seconds
PATIENCE = 20.0  # seconds in which a server has to answer, one that is just starting too


def draw_runs(
    run_dirs: Sequence[Path], server: str, *, say: Callable[[str], None] = print, period: float = 2.0
) -> list[str]:
    """Draw every run in its environment on a server, and several of them in one more, beside each other.

    Each page's address is said, and returned, when all is drawn and saved: the comparison's last. While one of the
    runs goes on they are drawn every `period` seconds, until Ctrl-C. UserError for what is no run, or no server.
    """
    runs = _Runs(run_dirs, server)
    runs.draw()
    for url in runs.urls:
        say(url)
    with suppress(KeyboardInterrupt):
        if runs.going:
            say("drawn until they end, or Ctrl-C")
        while runs.going:
            time.sleep(period)
            runs.draw()
    return runs.urls


class _Runs:
    """Runs and a server to draw them on."""

    def __init__(self, run_dirs: Sequence[Path], server: str) -> None:
        self._drawer = Drawer(server)
        self._views = [_view_of(run_dir) for run_dir in dict.fromkeys(path.resolve() for path in run_dirs)]
        self._comparison = ComparisonView(self._views) if len(self._views) > 1 else None
        self._unsaved: set[str] = set()
        self._saved: dict[str, float] = {}  # when
        self._others: set[str] | None = None  # environments that the runs' own processes draw
        self.urls = [self._drawer.url(view.environment) for view in self._views]
        if self._comparison is not None:
            self.urls.append(self._drawer.url(self._comparison.environment))

    @property
    def going(self) -> bool:
        """Whether one of them goes on."""
        return any(_goes_on(view) for view in self._views)

    def draw(self) -> None:
        """Draw and save all; UserError when the server does not take it for a while."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._draw()
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._drawer.forget()
                if time.monotonic() > deadline:
                    raise UserError(f"{self._drawer.server} does not take the runs: {error or repr(error)}") from None
                time.sleep(0.5)

    def _draw(self) -> None:
        for view in self._views:
            view.update()
        if self._others is None:
            self._others = {view.environment for view in self._views if self._has_its_own(view)}
        for view in self._views:
            if not (_goes_on(view) and view.environment in self._others):
                self._draw_page(view.environment, view.windows())
                register(view.run_dir)
        if self._comparison is not None:
            self._draw_page(self._comparison.environment, self._comparison.windows())

    def _draw_page(self, environment: str, windows: Iterable[Window]) -> None:
        """Draw what has changed; save it now and then, as it may hold a film, and when nothing goes on any more."""
        if self._drawer.draw(environment, windows):
            self._unsaved.add(environment)
        due = not self.going or time.monotonic() - self._saved.get(environment, -math.inf) > SAVE_EVERY
        if environment in self._unsaved and due:
            self._drawer.save(environment)
            self._unsaved.remove(environment)
            self._saved[environment] = time.monotonic()

    def _has_its_own(self, view: RunView) -> bool:
        """Whether the process that trains a run draws it there: two would take turns with its film."""
        drawn = _goes_on(view) and load_run(view.run_dir).dashboard != "off"
        return drawn and self._drawer.holds(view.environment, "run")


def _goes_on(view: RunView) -> bool:
    return view.run is not None and view.run.state == "running"


def _view_of(run_dir: Path) -> RunView:
    return RunView(run_dir, Path(load_run(run_dir).video_dir) / run_dir.name)
