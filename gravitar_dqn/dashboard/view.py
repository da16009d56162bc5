"""What is shown of a run: windows, brought up to the files of its folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gravitar_dqn.dashboard.board import Board
from gravitar_dqn.dashboard.charts import Chart
from gravitar_dqn.dashboard.panes import Pane, Window, run_pane, settings_pane, video_pane
from gravitar_dqn.dashboard.registry import environment_name
from gravitar_dqn.dashboard.tail import CsvTail
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.status import Standing, standing

LARGEST_VIDEO = 16 * 2**20  # bytes
VIDEO_NAME = re.compile(r"episode_(\d+)_score_(-?[\d.]+)\.mp4")
SOURCES = ("metrics", "episodes", "evaluations")


class RunView:
    """The windows of one run. `update` reads its files, `windows` says what is in them."""

    def __init__(self, run_dir: Path, video_dir: Path | None = None) -> None:
        self.run_dir = run_dir
        self.environment = environment_name(run_dir)
        self.run: Standing | None = None  # None: config.json is not there, or not readable
        self._video_dir = video_dir
        self.board = Board({})
        self._boards = 0  # so far: a revision of one is not one of the next
        self._settings: dict[str, Any] = {}
        self._settings_time = 0  # st_mtime_ns of config.json
        self._tails = {name: CsvTail(run_dir / f"{name}.csv") for name in SOURCES}

    def update(self, running: bool | None = None) -> None:
        """Bring it up to the files; `running` as in `standing`."""
        self._follow()
        self.run = None
        with suppress(UserError, OSError, ValueError):
            self.run = standing(self.run_dir, running=running)

    def _follow(self) -> None:
        self._read_settings()
        for source, tail in self._tails.items():
            while rows := tail.read():
                for row in rows:
                    self.board.add(source, row)
                if len(rows) > 100:  # a long history, of a resumed run: let the training thread have its share
                    time.sleep(0.02)
            if rows is None:
                self._start_over()
                return self._follow()
        return None

    def _start_over(self) -> None:
        self.board = Board(self._settings)
        self._boards += 1
        for tail in self._tails.values():
            tail.rewind()

    def _read_settings(self) -> None:
        path = self.run_dir / "config.json"
        with suppress(OSError, ValueError):
            changed = path.stat().st_mtime_ns
            if changed != self._settings_time:
                self._settings = dict(json.loads(path.read_text()))
                self._settings_time = changed
                self._start_over()

    def windows(self) -> Iterator[Window]:
        """Run, score and film first, where nobody has to scroll to; the settings last."""
        yield "run", self.run, partial(run_pane, self.run)
        first, *rest = [
            (chart.key, self.revision(chart), partial(self.board.pane, chart)) for chart in self.board.charts
        ]
        yield first
        video = self._last_video()
        yield "video", video or self._settings_time, partial(_video, video[1] if video else None, self._no_film())
        yield from rest
        yield "settings", self._settings_time, partial(settings_pane, self._settings)

    def revision(self, chart: Chart) -> tuple[int, int]:
        """Changes with every sample of the chart, and when the run's files are read from their start again."""
        return self._boards, self.board.revision(chart)

    def _no_film(self) -> str:
        """What is said before there is a film: when there will be one."""
        every = 0 if self.run is None else self.run.config.video_every
        return f"drawn when one is filmed: every {every} games" if every else "none is filmed: --video-every 25 does it"

    def _last_video(self) -> tuple[int, Path] | None:
        """The newest recording that is small enough to travel within the page, after the time it was written."""
        videos: list[tuple[int, Path]] = []
        if self._video_dir is None:
            return None
        with suppress(OSError):  # no folder yet, or a recording that was just deleted
            paths = [path for path in self._video_dir.iterdir() if VIDEO_NAME.fullmatch(path.name)]
            stats = [(path.stat(), path) for path in paths]
            videos = [(stat.st_mtime_ns, path) for stat, path in stats if stat.st_size <= LARGEST_VIDEO]
        return max(videos, default=None)


def _video(path: Path | None, otherwise: str) -> Pane:
    match = VIDEO_NAME.fullmatch(path.name) if path else None
    if path is None or match is None:
        return video_pane(otherwise, None)
    return video_pane(f"episode {int(match[1])}, score {match[2]}", path.read_bytes())
