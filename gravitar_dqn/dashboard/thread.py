"""The live dashboard: a thread that follows the files of a run's folder and draws them on a Visdom server.

Training knows nothing of it: it appends to CSV files, and this thread reads them. So a server that is down, slow or
hung costs training nothing, and one that was restarted is simply sent everything again.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gravitar_dqn.dashboard.board import Board, Pane, settings_pane, video_pane
from gravitar_dqn.errors import UserError

log = logging.getLogger(__name__)

READ_TIMEOUT = 5.0  # seconds; Visdom's own client would wait for ever
LARGEST_VIDEO = 16 * 2**20  # bytes
LONGEST_PAUSE = 10.0  # seconds
CHUNK = 128 * 1024  # bytes of CSV parsed at a time
VIDEO_NAME = re.compile(r"episode_(\d+)_score_(-?[\d.]+)\.mp4")


class CsvTail:
    """Reads what was appended to a CSV file of numbers; starts anew when the file was replaced or shortened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rewind()

    def rewind(self) -> None:
        self._inode = -1
        self._offset = 0
        self._last = b""  # the bytes before the offset, to notice a file that was rewritten in place
        self._header: list[str] = []

    def read(self) -> list[dict[str, float]] | None:
        """The next rows, at most a chunk; [] when there are no more for now; None when all rows so far are void."""
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                file.seek(self._offset - len(self._last))
                data = file.read(len(self._last) + CHUNK)
        except FileNotFoundError:
            return [] if self._offset == 0 else None
        if self._offset and (inode != self._inode or not data.startswith(self._last)):
            return None
        # A last line without its end is still being written: leave it for the next time.
        data = data[len(self._last) : data.rfind(b"\n") + 1]
        if not data:
            return []
        self._inode = inode
        self._offset += len(data)
        self._last = data[-64:]
        lines = data.decode(errors="replace").splitlines()
        if not self._header:
            self._header = lines.pop(0).split(",")
        return [dict(zip(self._header, map(_number, line.split(",")), strict=False)) for line in lines]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


class Connection:
    """One HTTP connection to a Visdom server, kept open so that a server's restart shows as an error.

    Speaks Visdom's own protocol (a JSON message a window) instead of using its client: that one takes a second to
    import, five times as long per window, has no timeouts, and prints tracebacks.
    """

    def __init__(self, server: str) -> None:
        url = urlsplit(server)
        connect = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._http = connect(url.hostname or "", url.port, timeout=READ_TIMEOUT)
        self._base = url.path.rstrip("/")

    def draw(self, pane: Pane) -> None:
        answer = self.post("events", pane)
        if answer != pane["win"]:
            raise ConnectionError(f"the server did not take the window {pane['win']!r}: {answer[:80]!r}")

    def post(self, endpoint: str, message: dict[str, Any]) -> str:
        body = json.dumps(message, allow_nan=False).encode()
        self._http.request("POST", f"{self._base}/{endpoint}", body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != 200:
            raise ConnectionError(f"HTTP status {response.status}")
        return text

    def close(self) -> None:
        # Shut down first: it wakes a thread that waits for an answer.
        with suppress(OSError, AttributeError):
            self._http.sock.shutdown(socket.SHUT_RDWR)
        self._http.close()


class Dashboard:
    """Draws a run's folder on a Visdom server from a thread of its own.

    Writes to one Visdom environment, `environment`, and never to another's; `url` is its page. `period` is the least
    time between two drawings, in seconds.
    """

    def __init__(self, run_dir: Path, server: str, *, video_dir: Path | None = None, period: float = 1.0) -> None:
        self.environment = environment_name(run_dir)
        self._server = check_address(server)
        self.url = f"{self._server}/env/{self.environment}"
        self._run_dir = run_dir
        self._video_dir = video_dir
        self._period = period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._connection: Connection | None = None
        self._sent: dict[str, object] = {}  # window -> the revision that the server has
        self._board = Board({})
        self._settings: dict[str, Any] = {}
        self._settings_time = 0  # st_mtime_ns of config.json
        self._tails = {name: CsvTail(run_dir / f"{name}.csv") for name in ("metrics", "episodes")}
        self._answered = False

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 3.0) -> None:
        """Draw once more if the server answers; back within `timeout` seconds in any case."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        connection = self._connection
        if self._thread.is_alive() and connection is not None:
            connection.close()

    def _run(self) -> None:
        failures = 0
        last = False
        while not last:
            last = self._stop.is_set()  # looked at before reading, so that the last drawing has all rows
            started = time.monotonic()
            try:
                self._follow()
                self._draw()
                if last and self._connection is not None:  # a finished run outlives the server's memory
                    self._connection.post("save", {"data": [self.environment], "eid": self.environment})
                self._answered = True
                failures = 0
            except Exception as error:  # whatever it is, training goes on and the next attempt starts clean
                failures += 1
                self._forget_server()
                self._complain(failures, error)
            self._stop.wait(0 if last else pause(self._period, failures, time.monotonic() - started))
        self._forget_server()

    def _complain(self, failures: int, error: Exception) -> None:
        # Once, and only if nothing was ever drawn: a server that is just starting up is no news, nor is one that went.
        if failures == 4 and not self._answered:
            log.warning("the dashboard is not drawn yet: %s: %s", self._server, error or repr(error))

    def _forget_server(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._sent.clear()

    def _follow(self) -> None:
        """Bring the board up to the files."""
        self._read_settings()
        for source, tail in self._tails.items():
            while rows := tail.read():
                for row in rows:
                    self._board.add(source, row)
                if len(rows) > 100:  # a long history, of a resumed run: let the training thread have its share
                    time.sleep(0.02)
            if rows is None:
                self._start_over()
                return self._follow()
        return None

    def _start_over(self) -> None:
        before, self._board = self._board, Board(self._settings)
        if self._sent and self._connection is not None and self._board.charts != before.charts:
            # A window's place is when it came: those from before config.json was there would stay in front.
            self._connection.post("close", {"win": None, "eid": self.environment})
        self._sent.clear()
        for tail in self._tails.values():
            tail.rewind()

    def _read_settings(self) -> None:
        path = self._run_dir / "config.json"
        with suppress(OSError, ValueError):
            changed = path.stat().st_mtime_ns
            if changed != self._settings_time:
                self._settings = dict(json.loads(path.read_text()))
                self._settings_time = changed
                self._start_over()

    def _draw(self) -> None:
        """Send the windows that the server does not have yet, always in the same order, which is their place."""
        if self._connection is None:
            self._connection = Connection(self._server)
        for key, revision, make in self._windows():
            if key not in self._sent or self._sent[key] != revision:
                self._connection.draw({**make(), "eid": self.environment})
                self._sent[key] = revision

    def _windows(self) -> Iterator[tuple[str, object, Callable[[], Pane]]]:
        """Each window's key, the revision of what it shows, and how to make it."""
        for chart in self._board.charts:
            yield chart.key, self._board.revision(chart), partial(self._board.pane, chart)
        video = self._last_video()
        yield "video", video, partial(_video, video[1] if video else None)
        yield "settings", self._settings_time, partial(settings_pane, self._settings)

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


def _video(path: Path | None) -> Pane:
    match = VIDEO_NAME.fullmatch(path.name) if path else None
    if path is None or match is None:
        return video_pane("", None)
    return video_pane(f"episode {int(match[1])}, score {match[2]}", path.read_bytes())


def environment_name(run_dir: Path) -> str:
    """The run's environment on the server: its folder's name and six letters of its whole path's hash.

    Visdom folds names at "_" and reads "/", "+" and more as its own; what is left may be the same for two folders, or
    the name of somebody else's environment, hence the hash.
    """
    path = run_dir.resolve()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", path.name).strip("-.")[:80]
    return f"{name or 'run'}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def pause(period: float, failures: int, took: float) -> float:
    """Seconds until the next drawing, which gets a twentieth of the time at most; failures double the wait."""
    wait = max(period, 20 * took) if failures == 0 else period * 2 ** min(failures - 1, 10)
    return min(wait, LONGEST_PAUSE)


def check_address(server: str) -> str:
    """A server's address with its scheme; UserError when it is none."""
    server = server if "://" in server else f"http://{server}"
    with suppress(ValueError):
        url = urlsplit(server)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return server.rstrip("/")
    raise UserError(f"--dashboard: {server!r} is not a server's address; give one such as http://127.0.0.1:8097")
