"""Our server's own pages and what it does by itself: the list of runs, comparisons, runs that died; and no more."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import injected
from visdom_helpers import ROOT, Server, append_metrics, environ, saved_at, wait_until, write_run

from gravitar_dqn.charts import BLUE, ORANGE
from gravitar_dqn.dashboard.compare import state_of
from gravitar_dqn.dashboard.draw import draw_runs
from gravitar_dqn.dashboard.pages import VISDOM_TITLE, entitled
from gravitar_dqn.dashboard.registry import environment_name, register, registered
from gravitar_dqn.dashboard.thread import Dashboard
from gravitar_dqn.dashboard.visdom_files import cache_dir, installed_visdom
from gravitar_dqn.run.folder import lock

HOLD = """
import sys, time, pathlib
from gravitar_dqn.run_dir import lock
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
        self.commands: list[str] = []
        self.sid = ""

    def visit(self, what: Callable[[Page], Any]) -> None:
        """Open the socket, and do `what`, an async function, while it is read."""

        async def visit() -> None:
            from tornado.websocket import websocket_connect

            socket = await websocket_connect(f"ws://127.0.0.1:{self.server.port}/socket")
            self.send = socket.write_message

            async def read() -> None:
                while (message := await socket.read_message()) is not None:
                    said = json.loads(message)
                    self.commands.append(said["command"])
                    if said["command"] == "register":
                        self.sid = said["data"]
                    elif said["command"] == "window":
                        self.windows[said["id"]] = said
                self.commands.append("lost")

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

    def curve(self, window: str, name: str) -> dict[str, Any]:
        data = self.windows.get(window, {}).get("content", {}).get("data", [])
        return next((trace for trace in data if trace["name"] == name), {"x": []})


# The list of runs.


def test_the_front_page_lists_runs_newest_first_and_how_they_stand(tmp_path: Path, server: Server) -> None:
    assert "No run has been drawn here yet" in server.get("/")[2]
    runs = [write_run(tmp_path / name, 10, seed=seed) for seed, name in enumerate(["older", "<i>&newer"])]
    (runs[1] / "eval.json").write_text('{"mean": 2124.5, "episodes": 100}')
    draw_runs(runs, server.url, say=str)
    server.post("events", {"data": [{"type": "text", "content": "x"}], "win": "w", "layout": {}, "eid": "<b>else"})
    with lock(runs[0]):
        status, _, page = server.get("/")
    assert status == 200 and "<title>runs</title>" in page
    rows = re.findall(r"<tr>.*?</tr>", page)[1:]
    assert ["newer" in row for row in rows] == [True, False]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[0])
    assert "&lt;i&gt;&amp;newer" in cells[1] and "<i>" not in page
    assert f"env/{environment_name(runs[1])}" in cells[1]
    assert cells[2:4] == ["gravitar", "1"]
    assert cells[5:] == ["10,000", "0.2 min", "189.0", "2,124.5 (100 games)"]
    assert "died" in cells[4] and "running" in rows[1], "as it is now, not as it was drawn"
    assert "&lt;b&gt;else" in page and "<b>" not in page.split("Other pages")[1]
    assert "compare-" in page and ">main<" not in page


def test_a_run_whose_folder_went_is_listed_by_its_name(tmp_path: Path, server: Server) -> None:
    run = write_run(tmp_path / "run", 10)
    draw_runs([run], server.url, say=str)
    run.rename(tmp_path / "elsewhere")
    page = server.get("/")[2]
    assert f"<li><a href='env/{environment_name(run)}'>" in page and "<tr>" not in page


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


# Pages and their titles.


def test_pages_have_titles_and_unknown_ones_lead_elsewhere(tmp_path: Path, server: Server) -> None:
    runs = [write_run(tmp_path / name, 10, seed=seed) for seed, name in enumerate("ab")]
    one, two, _ = [url.rpartition("/")[2] for url in draw_runs(runs, server.url, say=str)]
    assert f"<title>{one}</title>" in server.get(f"/env/{one}")[2]
    status, _, page = server.get(f"/compare/{one}+{two}")
    assert status == 200 and f"<title>compare {one} + {two}</title>" in page
    if installed_visdom()[1] == "0.2.4":  # later ones read the page's address
        assert f"ACTIVE_ENV = '{one}+{two}'" in page
    assert "<title>not-there-yet</title>" in server.get("/env/not-there-yet")[2]
    for asked, leads in {
        f"/compare/{one}+nowhere": f"/env/{one}",
        f"/compare/{one}+{one}": f"/env/{one}",
        f"/compare/{two}+x+{one}": f"/compare/{two}+{one}",
        "/compare/x+y": "/",
        "/env/<script>": "/",
        "/env/a%5C'": "/",
    }.items():
        assert server.get(asked)[:2] == (302, leads), asked


def test_a_title_is_escaped() -> None:
    assert entitled(f"a {VISDOM_TITLE} b", "</title>").startswith("a <title>&lt;/title&gt;</title><script>")


# Comparisons.


def test_a_comparison_is_sent_in_colours_and_goes_on(tmp_path: Path, server: Server) -> None:
    runs = [write_run(tmp_path / name, 10, seed=seed) for seed, name in enumerate("ab")]
    one, two, _ = [url.rpartition("/")[2] for url in draw_runs(runs, server.url, say=str)]
    names = ["gravitar, seed 0: epsilon", "gravitar, seed 1: epsilon"]

    async def look(page: Page) -> None:
        await page.ask(f"compare/{one}+{two}+nowhere")
        await page.until(lambda: "layout" in page.commands)
        assert [*page.windows][:2] == ["runs-compared", "score-compared"]
        traces = [page.curve("epsilon-compared", name) for name in names]
        assert [(len(trace["x"]), trace["line"]["color"]) for trace in traces] == [(10, BLUE), (10, ORANGE)]
        sent = len(page.commands)
        append_metrics(runs[1], 10)
        await asyncio.to_thread(draw_runs, [runs[1]], server.url, say=str)
        await page.until(lambda: len(page.curve("epsilon-compared", names[1])["x"]) == 11)
        assert len(page.curve("epsilon-compared", names[0])["x"]) == 10
        assert page.commands[sent:].count("window") <= 8, "only what changed, once"
        # Its page closes windows of an environment that it does not have.
        page.send(json.dumps({"cmd": "close", "data": "score-compared", "eid": None}))
        del page.windows["score-compared"]
        append_metrics(runs[1], 11)
        await asyncio.to_thread(draw_runs, [runs[1]], server.url, say=str)
        await page.until(lambda: len(page.curve("epsilon-compared", names[1])["x"]) == 12)
        assert "score-compared" not in page.windows, "it stays closed"
        await page.ask(f"env/{one}")  # and back to a run
        await page.until(lambda: "settings" in page.windows)
        assert "lost" not in page.commands

    Page(server).visit(look)


def test_only_a_page_that_is_open_can_ask_for_a_comparison(server: Server) -> None:
    assert server.post("compare/main+main", {"sid": "somebody"}) == ""
    assert server.post("env_state", {}) == ["main"]


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
