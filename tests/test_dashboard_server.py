"""What our server does by itself: it comes to say which runs have died; and it needs no more than it must."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import injected
from visdom_helpers import ROOT, Server, append_metrics, environ, saved_at, wait_until, write_run

from gravitar_dqn.dashboard.draw import draw_runs
from gravitar_dqn.dashboard.panes import state_of
from gravitar_dqn.dashboard.registry import environment_name, register, registered
from gravitar_dqn.dashboard.thread import Dashboard
from gravitar_dqn.dashboard.visdom_files import cache_dir
from gravitar_dqn.run.folder import lock

HOLD = """
import sys, time, pathlib
from gravitar_dqn.run.folder import lock
with lock(pathlib.Path(sys.argv[1])):
    time.sleep(99)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Page:
    """A page of the server without a browser: its websocket, and what came over it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.windows: dict[str, Any] = {}
        self.sid = ""

    def visit(self, what: Callable[[Page], Any]) -> None:
        """Open the socket, and do `what`, an async function, while it is read."""

        async def visit() -> None:
            from tornado.websocket import websocket_connect

            socket = await websocket_connect(f"ws://127.0.0.1:{self.server.port}/socket")

            async def read() -> None:
                while (message := await socket.read_message()) is not None:
                    said = json.loads(message)
                    if said["command"] == "register":
                        self.sid = said["data"]
                    elif said["command"] == "window":
                        self.windows[said["id"]] = said

            reading = asyncio.ensure_future(read())
            await self.until(lambda: self.sid)
            await what(self)
            reading.cancel()
            socket.close()

        asyncio.run(visit())

    async def until(self, true: Callable[[], object]) -> None:
        async def wait() -> None:
            while not true():
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), 15)

    async def ask(self, path: str) -> None:
        await asyncio.to_thread(self.server.post, path, {"sid": self.sid})


# Which runs the server knows.


def test_the_registry_survives_what_lies_in_its_folder(tmp_path: Path) -> None:
    assert registered() == {}
    run = write_run(tmp_path / "run", 1)
    for _ in range(2):
        register(run)
    folder = cache_dir() / "runs"
    (folder / "gone").symlink_to(tmp_path / "gone")
    (folder / "empty").symlink_to(tmp_path)
    (folder / "file").write_text("")
    assert registered() == {environment_name(run): run}
    other = write_run(tmp_path / "other", 1)
    register(other)
    assert {link.name for link in folder.iterdir()} == {environment_name(run), environment_name(other), "empty", "file"}


def test_a_registry_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    cache_dir().mkdir(parents=True)
    (cache_dir() / "runs").write_text("a file")
    register(write_run(tmp_path / "run", 1))
    assert registered() == {}


# Runs that ended without a word.


@pytest.mark.parametrize("before", ["new", "resumed after the server's restart"])
@pytest.mark.faults
def test_the_page_of_a_killed_run_comes_to_say_so(tmp_path: Path, server: Server, before: str) -> None:
    injected("SIGKILL of the training process")
    run = write_run(tmp_path / "run", 10)
    name = environment_name(run)
    if before != "new":
        draw_runs([run], server.url, say=str)
        server.kill()
        server.start()
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, cwd=ROOT, env=environ(tmp_path / "cache")) as training:
        wait_until(lambda: (run / "lock").exists())
        board = Dashboard(run, server.url, period=1000)
        board.start()
        try:
            wait_until(lambda: state_of(server.windows(name)) == "running")
            wait_until(lambda: name in registered())
            training.send_signal(signal.SIGKILL)
            training.wait()
            wait_until(lambda: state_of(server.windows(name)) == "died")
            server.kill()
            server.start()
            assert state_of(server.windows(name)) == "died", "it was saved"
        finally:
            board.close(0.1)


def test_a_run_that_died_while_no_server_ran_is_told_when_it_is_opened(tmp_path: Path, server: Server) -> None:
    run = write_run(tmp_path / "run", 10)
    name = environment_name(run)
    with lock(run):
        board = Dashboard(run, server.url, period=1000)
        board.start()
        wait_until(lambda: len(server.windows(name)) == 9)
        server.post("save", {"data": [name]})
        server.kill()
        board.close(0.1)
    server.start()

    async def look(page: Page) -> None:
        await page.ask(f"env/{name}")
        await page.until(lambda: "settings" in page.windows)
        assert state_of(page.windows) == "died"

    Page(server).visit(look)


def test_the_last_drawing_says_how_a_run_ended(tmp_path: Path, server: Server) -> None:
    run = write_run(tmp_path / "run", 10, total_steps=11_000)
    with lock(run):
        board = Dashboard(run, server.url, period=1000)
        board.start()
        wait_until(lambda: state_of(server.windows(board.environment)) == "running")
        append_metrics(run, 10)
        saved_at(run, 11_000)
        board.close()
        assert state_of(server.windows(board.environment)) == "finished"


# The process.


def test_the_server_needs_no_torch(tmp_path: Path, server: Server) -> None:
    assert server.process is not None
    draw_runs([write_run(tmp_path / "run", 10)], server.url, say=str)
    server.get("/")
    maps = Path(f"/proc/{server.process.pid}/maps")
    if maps.exists():
        assert "torch" not in maps.read_text()


def test_a_second_one_says_where_the_first_is(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/dashboard.py", "--port", str(server.port)]
    done = subprocess.run(
        command, cwd=ROOT, env=environ(tmp_path / "cache"), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"the dashboard's server runs already, at {server.url} "
        f"(scripts/dashboard.py --port {server.port} --stop stops it)\n"
    )
    other = {**environ(tmp_path / "another"), "HOME": str(tmp_path)}  # somebody else's server
    done = subprocess.run(command, cwd=ROOT, env=other, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.startswith(f"error: port {server.port} is taken; ")
