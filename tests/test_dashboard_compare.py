"""Comparisons: several runs' windows merged, and runs drawn by the command, finished, live and unfit ones."""

from __future__ import annotations

import _thread
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from visdom_helpers import WINDOWS, Server, append_metrics, pretend_prepared, saved_at, wait_until, write_run

from gravitar_dqn.charts import BLUE, GREEN, ORANGE
from gravitar_dqn.dashboard import draw
from gravitar_dqn.dashboard.compare import COLORS, held, labels_of, merge, pane_of
from gravitar_dqn.dashboard.draw import draw_runs
from gravitar_dqn.dashboard.registry import environment_name, registered
from gravitar_dqn.dashboard.view import RunView
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.folder import lock

Windows = dict[str, dict[str, Any]]


def windows_of(run_dir: Path) -> Windows:
    """A run's windows as the server holds them."""
    view = RunView(run_dir)
    view.update()
    return {key: {**held(make(), revision), "i": i} for i, (key, revision, make) in enumerate(view.windows())}


def titled(windows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    return next(window for window in windows if window["title"] == title)


def lines(window: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in window["content"]["data"]}


def text_of(windows: Windows) -> str:
    return json.dumps(windows, allow_nan=False)


# Merged, without a server.


def test_a_run_has_a_colour_and_its_lines_have_dashes(tmp_path: Path) -> None:
    runs = {name: windows_of(write_run(tmp_path / name, 50, seed=seed)) for seed, name in enumerate("abc")}
    before = text_of(runs["a"])
    merged = merge(runs)
    titles = ["Runs", "Score", "Loss", "Expected return", "Epsilon", "Speed", "Replay buffer"]
    assert [window["title"] for window in merged] == titles
    assert all(window["has_compare"] is True and window["command"] == "window" for window in merged)
    speed = lines(titled(merged, "Speed"))
    names = [
        f"gravitar, seed {seed}: {line}" for seed in range(3) for line in ("frames/s acting", "samples/s learning")
    ]
    assert [*speed] == names
    assert [trace["line"]["color"] for trace in speed.values()] == [BLUE, BLUE, ORANGE, ORANGE, GREEN, GREEN]
    assert [trace["line"]["dash"] for trace in speed.values()] == ["solid", "dash"] * 3
    assert [*lines(titled(merged, "Score"))] == [f"gravitar, seed {seed}: average of 100" for seed in range(3)]
    assert all(f"color:{color}" in merged[0]["content"] for color in (BLUE, ORANGE, GREEN))
    assert text_of(runs["a"]) == before, "what the server holds stays as it was"
    json.dumps(merged, allow_nan=False)


def test_a_merged_axis_has_the_decades_of_all(tmp_path: Path) -> None:
    runs = {name: windows_of(write_run(tmp_path / name, 50, seed=seed)) for seed, name in enumerate("ab")}
    trace = runs["b"]["loss"]["content"]["data"][0]
    trace["y"] = [y * 1e-4 for y in trace["y"]]
    yaxis = titled(merge(runs), "Loss")["content"]["layout"]["yaxis"]
    assert yaxis["range"] == [-7, -1]
    assert runs["a"]["loss"]["content"]["layout"]["yaxis"]["range"][0] > -5


def test_a_run_that_has_just_begun_takes_no_axes_away(tmp_path: Path) -> None:
    begun, other = (windows_of(write_run(tmp_path / name, ticks)) for name, ticks in (("a", 0), ("b", 50)))
    loss = titled(merge({"a": begun, "b": other}), "Loss")
    assert "annotations" not in loss["content"]["layout"]
    assert len(lines(loss)) == 2
    layout = titled(merge({"a": begun, "c": begun}), "Loss")["content"]["layout"]
    assert layout["annotations"][0]["text"].startswith("learning begins")


def test_labels_are_told_apart_by_folders_then_by_environments(tmp_path: Path) -> None:
    homes = {"e1": "x/one", "e2": "x/two", "e3": "x/three", "e4": "y/one"}
    runs = {name: windows_of(write_run(tmp_path / home, 5, seed=int(name == "e3"))) for name, home in homes.items()}
    assert labels_of({name: runs[name] for name in ("e1", "e2", "e3")}) == {
        "e1": "gravitar, seed 0 (one)",
        "e2": "gravitar, seed 0 (two)",
        "e3": "gravitar, seed 1",
    }
    assert labels_of({name: runs[name] for name in ("e1", "e4")}) == {"e1": "e1", "e4": "e4"}


def test_charts_in_other_units_are_not_mixed(tmp_path: Path) -> None:
    atari = windows_of(write_run(tmp_path / "a", 5))
    cartpole = windows_of(write_run(tmp_path / "b", 5, "cartpole", "CartPole-v1"))
    merged = merge({"a": atari, "b": cartpole})
    assert [window["title"] for window in merged] == ["Runs"]
    assert "no chart in common" in merged[0]["content"]


def test_other_peoples_windows_are_compared_by_their_environments_names() -> None:
    def window(y: list[float]) -> dict[str, Any]:
        data = [{"type": "scatter", "x": [1, 2], "y": y, "name": "<a>"}, {"type": "heatmap", "z": [[1]]}]
        return {"id": "window_1", "type": "plot", "title": "T", "content": {"data": data, "layout": {}}}

    text = {"id": "t", "type": "text", "title": "T", "content": "words"}
    merged = merge({"one": {"w": window([1, math.nan]), "t": text}, "<two>": {"v": window([math.inf, 2])}})
    assert [trace["y"] for trace in lines(merged[1]).values()] == [[1, None], [None, 2]]
    assert [*lines(merged[1])] == ["one: &lt;a&gt;", "&lt;two&gt;: &lt;a&gt;"]
    assert "<two>" not in merged[0]["content"]
    assert merge({})[0]["title"] == "Runs"


def test_what_is_shown_has_a_new_content_id_and_nothing_else_has(tmp_path: Path) -> None:
    homes = {name: write_run(tmp_path / name, 50) for name in "ab"}
    views = {name: RunView(home) for name, home in homes.items()}

    def ids() -> dict[str, str]:
        for view in views.values():
            view.update()
        runs = {
            name: {key: {**held(make(), revision), "i": i} for i, (key, revision, make) in enumerate(view.windows())}
            for name, view in views.items()
        }
        return {window["title"]: window["contentID"] for window in merge(runs)}

    before = ids()
    assert ids() == before
    with (homes["a"] / "metrics.csv").open("a") as file:
        file.write("1,99000,,,,,,,,,0.5,,,,,,\n")  # nothing but an epsilon
    after = ids()
    assert {title for title in before if before[title] != after[title]} == {"Epsilon"}


def test_many_runs_take_turns_with_the_colours(tmp_path: Path) -> None:
    windows = windows_of(write_run(tmp_path / "a", 5))
    merged = merge({f"e{i}": windows for i in range(10)})
    colors = [trace["line"]["color"] for trace in lines(titled(merged, "Epsilon")).values()]
    assert colors == [*COLORS, *COLORS[:2]]


def test_a_merged_window_goes_through_the_server_unchanged(tmp_path: Path) -> None:
    runs = {name: windows_of(write_run(tmp_path / name, 5)) for name in "ab"}
    for window in merge(runs):
        back = held(pane_of(window), window["contentID"])
        assert {key: window[key] for key in back} == back


# Drawn on a server.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pretend_prepared(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Server(tmp_path / "cache")
    server.start()
    yield server
    server.kill()


def test_finished_runs_are_drawn_saved_and_compared(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    runs = [
        write_run(tmp_path / f"seed{seed}", 20, seed=seed, total_steps=20_000, video_dir=str(videos)) for seed in (1, 2)
    ]
    for run in runs:
        saved_at(run, 20_000)
    (videos / "seed1").mkdir(parents=True)
    (videos / "seed1" / "episode_000025_score_700.mp4").write_bytes(b"m")
    urls = draw_runs([*runs, runs[0]], server.url)
    assert capsys.readouterr().out.split() == urls
    names = [url.removeprefix(f"{server.url}/env/") for url in urls]
    assert names[:2] == [environment_name(run) for run in runs]
    assert names[2].startswith("compare-") and len(names) == 3
    assert registered() == dict(zip(names, runs, strict=False))
    server.kill()
    server.start()  # it was saved
    for name, film in zip(names, (True, False), strict=False):
        windows = server.windows(name)
        assert [*windows] == WINDOWS
        assert "finished" in windows["run"]["content"]
        assert ("episode 25, score 700" in windows["video"]["content"]) == film
    compared = server.windows(names[2])
    assert [*lines(compared["epsilon-compared"])] == [f"gravitar, seed {seed}: epsilon" for seed in (1, 2)]
    assert draw_runs([runs[1], runs[0]], server.url, say=str)[2] == urls[2], "the same runs, the same comparison"
    assert len(draw_runs([runs[0]], server.url, say=str)) == 1


def test_a_live_run_without_a_dashboard_is_followed_to_its_end(tmp_path: Path, server: Server) -> None:
    runs = [write_run(tmp_path / "a", 10, seed=1), write_run(tmp_path / "b", 10, seed=2, dashboard="off")]
    name = environment_name(runs[1])
    said: list[str] = []
    with ExitStack() as held_lock:
        held_lock.enter_context(lock(runs[1]))
        thread = threading.Thread(target=lambda: draw_runs(runs, server.url, say=said.append, period=0.1))
        thread.start()
        wait_until(lambda: len(said) == 4)
        compared = said[2].rpartition("/")[2]
        assert "running" in server.windows(name)["run"]["content"]
        append_metrics(runs[1], *range(10, 30))
        wait_until(lambda: len(server.trace(name, "epsilon", "epsilon")[0]) == 30)
        wait_until(
            lambda: len(server.trace(compared, "epsilon-compared", "gravitar, seed 2: epsilon")[0]) == 30,
        )
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    assert "died" in server.windows(name)["run"]["content"]  # it left no checkpoint


def test_a_run_that_its_own_process_draws_is_left_to_that(tmp_path: Path, server: Server) -> None:
    run, other = write_run(tmp_path / "run", 10), write_run(tmp_path / "other", 10, seed=1)
    name = environment_name(run)
    theirs = {"data": [{"type": "text", "content": "theirs"}], "win": "run", "layout": {}, "opts": {}, "eid": name}
    with lock(run):
        server.post("events", theirs)
        thread = threading.Thread(target=lambda: draw_runs([run, other], server.url, say=str, period=0.1))
        thread.start()
        wait_until(lambda: [*server.windows(environment_name(other))] == WINDOWS)
        time.sleep(0.5)
        assert [window["content"] for window in server.windows(name).values()] == ["theirs"]
    thread.join(10)
    assert not thread.is_alive()
    assert [*server.windows(name)] == WINDOWS


def test_ctrl_c_ends_the_following_not_with_an_error(tmp_path: Path, server: Server) -> None:
    run = write_run(tmp_path / "run", 10, dashboard="off")
    said: list[str] = []
    threading.Thread(
        target=lambda: (wait_until(lambda: len(said) == 2), time.sleep(0.3), _thread.interrupt_main()), daemon=True
    ).start()
    with lock(run):
        assert draw_runs([run], server.url, say=said.append, period=0.1) == said[:1]


def test_windows_of_another_version_make_room(tmp_path: Path, server: Server) -> None:
    run = write_run(tmp_path / "run", 10)
    for window in ("score", "int_reward"):
        old = {"data": [{"type": "text", "content": "old"}], "win": window, "layout": {}, "opts": {}}
        server.post("events", {**old, "eid": environment_name(run)})
    draw_runs([run], server.url, say=str)
    assert [*server.windows(environment_name(run))] == WINDOWS


@pytest.mark.parametrize("what", ["no run", "no server", "no address"])
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(draw, "PATIENCE", 0.5)
    run = write_run(tmp_path / "run", 1)
    words = {
        "no run": ([tmp_path], "127.0.0.1:9", "is not a run's folder"),
        "no server": ([run], "127.0.0.1:9", "http://127.0.0.1:9 does not take the runs: .*refused"),
        "no address": ([run], "ftp://x", "is not a server's address"),
    }
    run_dirs, server, said = words[what]
    with pytest.raises(UserError, match=said) as error:
        draw_runs(run_dirs, server, say=str)
    assert "\n" not in str(error.value)
