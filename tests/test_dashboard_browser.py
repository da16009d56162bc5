"""The live page in a real browser: all windows drawn, the game playing, no request failing, the history kept."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from visdom_helpers import Server, append_metrics, pretend_prepared, saved_at, wait_until, write_run

from gravitar_dqn.dashboard.charts import BLUE, ORANGE
from gravitar_dqn.dashboard.draw import draw_runs
from gravitar_dqn.dashboard.thread import Dashboard
from gravitar_dqn.dashboard.visdom_files import prepared_files
from gravitar_dqn.run.folder import lock

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,1240"
)
TITLES = [
    "Run",
    "Score",
    "Last recorded game",
    "Loss",
    "Expected return",
    "Epsilon",
    "Speed",
    "Replay buffer",
    "Settings",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver"),
    pytest.mark.skipif(prepared_files() is None, reason="needs browser files: scripts/dashboard.py --prepare"),
]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pretend_prepared(tmp_path / "cache", prepared_files())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the dashboards tell it of their runs
    server = Server(tmp_path / "cache")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    no_internet = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    for flag in [*FLAGS.split(), no_internet, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own start page asked for
    yield browser
    browser.quit()


def record_game(path: Path) -> None:
    """Two seconds of a square that moves, in the size of the game's screen."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path.parent.mkdir(parents=True)
    writer = imageio_ffmpeg.write_frames(str(path), (160, 208), fps=30)
    writer.send(None)
    for shift in range(60):
        frame = bytearray(160 * 208 * 3)
        for row in range(60, 90):
            start = 3 * (160 * row + 2 * shift)
            frame[start : start + 90] = b"\xff\x80\x00" * 30
        writer.send(bytes(frame))
    writer.close()


def drawn(browser: Any) -> dict[str, int]:
    """The page's windows in their order: {title: how many curves, videos or table rows it shows}."""
    script = """
        const shown = w => w.querySelectorAll('.scatterlayer .trace path.js-line').length
            || w.querySelectorAll('video, tr').length;
        return [...document.querySelectorAll('.window')].map(
            w => [w.querySelector('.bar').innerText.split('\\n').pop().trim(), shown(w)]);
    """
    return dict(browser.execute_script(script))


def places(browser: Any) -> list[tuple[float, float, float, float]]:
    script = """return [...document.querySelectorAll('.window')].map(w => {
        const box = w.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; });"""
    return [tuple(box) for box in browser.execute_script(script)]


def failed_requests(browser: Any) -> list[str]:
    failed, asked = [], {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        method, params = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            asked[params["requestId"]] = params["request"]["url"]
        elif method == "Network.loadingFailed":
            failed.append(f"{asked.get(params['requestId'])}: {params['errorText']}")
        elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
            failed.append(f"{params['response']['url']}: {params['response']['status']}")
    return failed


def hosts(browser: Any) -> set[str]:
    script = "return performance.getEntriesByType('resource').map(e => new URL(e.name).host)"
    return set(browser.execute_script(script))


def test_the_live_page(tmp_path: Path, server: Server, browser: Any) -> None:
    run = write_run(tmp_path / "run", 2000)
    record_game(tmp_path / "videos" / "episode_000025_score_700.mp4")
    board = Dashboard(run, server.url, video_dir=tmp_path / "videos", period=0.2)
    training = ExitStack()
    training.enter_context(lock(run))
    board.start()
    try:
        wait_until(lambda: len(server.windows(board.environment)) == len(TITLES))
        browser.get(board.url)
        wait_until(lambda: list(drawn(browser)) == TITLES and all(drawn(browser).values()), 30)
        assert [drawn(browser)[title] for title in ("Score", "Loss", "Speed", "Last recorded game")] == [4, 1, 2, 1]
        play = "const v = document.querySelector('video'); return [v.currentTime, v.error === null]"
        first, intact = browser.execute_script(play)
        assert intact
        wait_until(lambda: browser.execute_script(play)[0] != first)
        boxes = places(browser)
        assert len({left for left, *_ in boxes}) == len({top for _, top, *_ in boxes}) == 3
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert all(x0 >= right or x1 <= left or y0 >= bottom or y1 <= top for x0, y0, x1, y1 in boxes[:i])
        if picture := os.environ.get("DASHBOARD_PICTURE"):
            browser.save_screenshot(picture)
        assert failed_requests(browser) == []
        assert hosts(browser) == {f"127.0.0.1:{server.port}"}  # it needs no internet

        server.kill()
        append_metrics(run, *range(2000, 2400))
        server.start()
        wait_until(lambda: len(server.windows(board.environment)) == len(TITLES))
        browser.get(board.url)
        wait_until(lambda: list(drawn(browser)) == TITLES and all(drawn(browser).values()), 30)
        newest = "return Math.max(...document.querySelectorAll('.js-plotly-plot')[3].data[0].x)"
        wait_until(lambda: browser.execute_script(newest) > 4 * 2_390_000)
    finally:
        board.close()
        training.close()


def curves(browser: Any) -> dict[str, dict[str, tuple[str, float]]]:
    """The page's charts: {title: {name of a curve: its colour and its last x}}."""
    script = """
        return [...document.querySelectorAll('.window')].filter(w => w.querySelector('.js-plotly-plot')).map(w => [
            w.querySelector('.bar').innerText.split('\\n').pop().trim(),
            w.querySelector('.js-plotly-plot').data.map(t => [t.name, [t.line.color, Math.max(...t.x)]])]);
    """
    return {title: dict(traces) for title, traces in browser.execute_script(script)}


def text_of(browser: Any, title: str) -> str:
    """What a window of text says; nothing where there is none."""
    script = """const found = [...document.querySelectorAll('.window')].find(
        w => w.querySelector('.bar').innerText.trim().endsWith(arguments[0]) && w.querySelector('.content-text'));
        return found ? found.querySelector('.content-text').innerText : '';"""
    return str(browser.execute_script(script, title))


def tick(browser: Any, environment: str) -> None:
    """Tick an environment in Visdom's list of them."""
    browser.find_element("css selector", ".rc-tree-select").click()
    box = f".rc-tree-select-tree [title='{environment}']"
    wait_until(lambda: browser.find_elements("css selector", box))
    browser.find_element("css selector", box).click()


def clear(browser: Any) -> None:
    """Untick every environment."""
    browser.find_element("css selector", ".rc-tree-select-selection__clear, .rc-tree-select-clear").click()


def test_runs_are_found_in_visdoms_list_compared_in_two_colours_and_seen_to_end(
    tmp_path: Path, server: Server, browser: Any
) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", 100, seed=seed, total_steps=120_000) for seed in (1, 2)]
    said: list[str] = []
    drawing = threading.Thread(target=lambda: draw_runs(runs, server.url, say=said.append, period=0.2))
    with lock(runs[0]), lock(runs[1]):
        boards = [Dashboard(run, server.url, period=0.2) for run in runs]
        one, two = (board.environment for board in boards)
        for board in boards:
            board.start()
        try:
            wait_until(lambda: len(server.windows(one)) == len(server.windows(two)) == len(TITLES))
            drawing.start()
            wait_until(lambda: len(said) == 4)
            browser.get(server.url)
            clear(browser)  # Visdom shows its own first, "main"
            tick(browser, one)
            wait_until(lambda: "running" in text_of(browser, "Run"), 30)
            assert "gravitar, seed 1" in text_of(browser, "Run") and "100,000 of 120,000" in text_of(browser, "Run")

            browser.get(said[2])
            wait_until(lambda: {"Score", "Loss", "Epsilon"} <= curves(browser).keys(), 30)
            both = {"gravitar, seed 1: epsilon": [BLUE, 400_000], "gravitar, seed 2: epsilon": [ORANGE, 400_000]}
            assert curves(browser)["Epsilon"] == both
            assert [*curves(browser)["Score"]] == [f"gravitar, seed {seed}: average of 100" for seed in (1, 2)]
            append_metrics(runs[1], 100)
            wait_until(lambda: curves(browser)["Epsilon"]["gravitar, seed 2: epsilon"] == [ORANGE, 404_000])
            if picture := os.environ.get("DASHBOARD_PICTURE"):
                browser.save_screenshot(picture.replace(".png", "-compared.png"))
            assert two in text_of(browser, "Runs")
            browser.find_element("link text", one).click()
            wait_until(lambda: "running" in text_of(browser, "Run"), 30)
            append_metrics(runs[0], *range(100, 120))
            saved_at(runs[0], 120_000)
        finally:
            for board in boards:
                board.close()
        wait_until(lambda: "finished" in text_of(browser, "Run"))
    drawing.join(10)
    browser.get(said[2])
    wait_until(lambda: "finished" in text_of(browser, "Runs") and "died" in text_of(browser, "Runs"), 30)
    assert failed_requests(browser) == []
