"""Windows on their way to a Visdom server: each is sent when it changed, and all again after trouble."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from gravitar_dqn.dashboard.panes import Pane, Window
from gravitar_dqn.errors import UserError

READ_TIMEOUT = 5.0  # seconds; Visdom's own client would wait for ever


def check_address(server: str) -> str:
    """A server's address with its scheme; UserError when it is none."""
    address = server if "://" in server else f"http://{server}"
    with suppress(ValueError):
        url, word = urlsplit(address), re.fullmatch(r"\w*", server)  # a word such as "no" is hardly a host
        if url.scheme in ("http", "https") and url.hostname and url.port != 0 and (not word or server == "localhost"):
            return address.rstrip("/")
    raise UserError(
        f"--dashboard: {server!r} is not a server's address; auto, off, or one such as http://127.0.0.1:8097"
    )


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


class Drawer:
    """Sends environments' windows to a server, and remembers what that has."""

    def __init__(self, server: str) -> None:
        self.server = check_address(server)
        self._connection: Connection | None = None
        self._sent: dict[str, dict[str, object]] = {}  # environment -> window -> the revision that the server has

    def url(self, environment: str) -> str:
        return f"{self.server}/env/{environment}"

    def draw(self, environment: str, windows: Iterable[Window]) -> bool:
        """Send the windows that the server does not have yet, in their order, which is their place; whether any."""
        if self._connection is None:
            self._connection = Connection(self.server)
        listed = list(windows)
        keys = [key for key, *_ in listed]
        sent = self._sent.setdefault(environment, {})
        if list(sent) != keys[: len(sent)] or (not sent and self.has_others(environment, keys)):
            # A window's place is when it came: those that were there before would stay in front.
            self._connection.post("close", {"win": None, "eid": environment})
            sent.clear()
        changed = [window for window in listed if window[0] not in sent or sent[window[0]] != window[1]]
        for key, revision, make in changed:
            self._connection.draw({**make(), "eid": environment})
            sent[key] = revision
        return bool(changed)

    def has_others(self, environment: str, keys: list[str]) -> bool:
        """Whether the server holds the environment with other windows, drawn by another version say."""
        return self.holds(environment) and not all(self.holds(environment, key) for key in keys)

    def holds(self, environment: str, window: str | None = None) -> bool:
        """Whether the server has the environment, or a window of it."""
        if self._connection is None:
            self._connection = Connection(self.server)
        if window is None:
            return environment in json.loads(self._connection.post("env_state", {}))
        return self._connection.post("win_exists", {"eid": environment, "win": window}) == "true"

    def save(self, environment: str) -> None:
        """Have the server write the environment to its disk, to outlive its memory."""
        if self._connection is not None:
            self._connection.post("save", {"data": [environment], "eid": environment})

    def hang_up(self) -> None:
        """Wake a thread that waits for the server's answer; callable from another one."""
        if (connection := self._connection) is not None:
            connection.close()

    def forget(self) -> None:
        """Start anew: the server may have gone."""
        self.hang_up()
        self._connection = None
        self._sent.clear()
