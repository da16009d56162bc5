"""Comparisons: several runs in one chart each, and runs drawn by the command, finished, live and unfit ones."""

from __future__ import annotations

import _thread
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from visdom_helpers import WINDOWS, Server, append_metrics, pretend_prepared, saved_at, wait_until, write_run

from gravitar_dqn.dashboard import draw
from gravitar_dqn.dashboard.charts import BLUE, GREEN, ORANGE
from gravitar_dqn.dashboard.compare import COLORS, ComparisonView, labels_of
from gravitar_dqn.dashboard.draw import draw_runs
from gravitar_dqn.dashboard.panes import Pane
from gravitar_dqn.dashboard.registry import environment_name, registered
from gravitar_dqn.dashboard.view import RunView
from gravitar_dqn.errors import UserError
from gravitar_dqn.run.folder import lock


def views_of(run_dirs: Sequence[Path]) -> list[RunView]:
    views = [RunView(run_dir) for run_dir in run_dirs]
    for view in views:
        view.update()
    return views


def compared(*run_dirs: Path) -> dict[str, Pane]:
    """The windows of a comparison, by their ids."""
    return {key: make() for key, _, make in ComparisonView(views_of(run_dirs)).windows()}


def lines(pane: Pane) -> dict[str, Pane]:
    return {trace["name"]: trace for trace in pane["data"]}


def content(pane: Pane) -> str:
    return str(pane["data"][0]["content"])


# Without a server.


def test_a_run_has_a_colour_and_its_lines_have_dashes(tmp_path: Path) -> None:
    panes = compared(*(write_run(tmp_path / name, 50, seed=seed) for seed, name in enumerate("abc")))
    titles = ["Runs", "Score", "Loss", "Expected return", "Epsilon", "Speed", "Replay buffer"]
    assert [pane["opts"]["title"] for pane in panes.values()] == titles
    assert all(pane["win"] == key for key, pane in panes.items())
    speed = lines(panes["speed-frames"])
    names = [
        f"gravitar, seed {seed}: {line}" for seed in range(3) for line in ("frames/s acting", "samples/s learning")
    ]
    assert [*speed] == names
    assert [trace["line"]["color"] for trace in speed.values()] == [BLUE, BLUE, ORANGE, ORANGE, GREEN, GREEN]
    assert [trace["line"]["dash"] for trace in speed.values()] == ["solid", "dash"] * 3
    assert all(len(trace["x"]) == len(trace["y"]) == 50 for trace in speed.values())
    assert [*lines(panes["score-frames"])] == [f"gravitar, seed {seed}: average of 100" for seed in range(3)]
    json.dumps(panes, allow_nan=False)


def test_the_table_says_how_each_run_stands_and_leads_to_its_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 10, seed=seed, total_steps=10_000) for seed, name in enumerate("abc")]
    saved_at(runs[2], 10_000)
    with lock(runs[1]):
        table = content(compared(*runs)["runs"])
    rows = table.split("<tr>")[1:]
    found = zip(runs, rows, ("died", "running", "finished"), (BLUE, ORANGE, GREEN), strict=True)
    for seed, (run, row, state, color) in enumerate(found):
        assert f"'color:{color};" in row and f"data-state='{state}'" in row and f"gravitar, seed {seed}<" in row
        assert f"<a href='/env/{environment_name(run)}'>{environment_name(run)}</a>" in row
    assert "in common" not in table


def test_many_lines_have_their_names_beside_the_chart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{seed}", 5, seed=seed) for seed in range(7)]
    for count, y in ((6, -0.2), (7, 1)):
        layout = compared(*runs[:count])["epsilon-frames"]["layout"]
        assert layout["showlegend"] and layout["legend"]["y"] == y


def test_a_shared_axis_has_the_decades_of_all(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 50, seed=seed) for seed, name in enumerate("ab")]
    with (runs[1] / "metrics.csv").open("a") as file:
        file.write("1,99000,,,,,,,,,,1e-7,,,,,\n")  # nothing but a loss
    yaxis = compared(*runs)["loss-frames"]["layout"]["yaxis"]
    assert yaxis["range"] == [-7, -1]
    assert yaxis["title"] == {"text": "loss (log)"}
    own = next(make() for key, _, make in views_of(runs)[0].windows() if key == "loss")
    assert own["layout"]["yaxis"]["range"][0] > -5


def test_a_run_that_has_just_begun_takes_no_axes_away(tmp_path: Path) -> None:
    begun, other, third = (write_run(tmp_path / name, ticks) for name, ticks in (("a", 0), ("b", 50), ("c", 0)))
    loss = compared(begun, other)["loss-frames"]
    assert "annotations" not in loss["layout"] and loss["layout"]["showlegend"]
    assert len(lines(loss)) == 2
    layout = compared(begun, third)["loss-frames"]["layout"]
    assert layout["annotations"][0]["text"].startswith("learning begins")
    assert not layout["showlegend"]


def test_labels_are_told_apart_by_folders_then_by_environments(tmp_path: Path) -> None:
    one, two, three, four = (
        write_run(tmp_path / home, 5, seed=int(home == "x/three")) for home in ("x/one", "x/two", "x/three", "y/one")
    )
    assert labels_of(views_of([one, two, three])) == [
        "gravitar, seed 0 (one)",
        "gravitar, seed 0 (two)",
        "gravitar, seed 1",
    ]
    assert labels_of(views_of([one, four])) == [environment_name(one), environment_name(four)]
    (three / "config.json").write_text("{")
    assert labels_of(views_of([one, three])) == ["gravitar, seed 0", environment_name(three)]


def test_a_comparison_escapes_the_names_of_folders(tmp_path: Path) -> None:
    panes = compared(*(write_run(tmp_path / name, 5) for name in ("<i>&a", "<i>&b")))
    assert "<i>" not in content(panes["runs"]) and "(&lt;i&gt;&amp;a)" in content(panes["runs"])
    assert next(iter(lines(panes["epsilon-frames"]))) == "gravitar, seed 742 (&lt;i&gt;&amp;a): epsilon"


def test_charts_in_other_units_are_not_mixed(tmp_path: Path) -> None:
    atari = [write_run(tmp_path / f"a{seed}", 5, seed=seed) for seed in (1, 2)]
    cartpole = [write_run(tmp_path / f"b{seed}", 5, "cartpole", "CartPole-v1", seed=seed) for seed in (1, 2)]
    panes = compared(atari[0], cartpole[0])
    assert [*panes] == ["runs"]
    assert "no chart in common" in content(panes["runs"])
    panes = compared(*atari, *cartpole)
    for x, preset in (("frames", "gravitar"), ("environment-steps", "cartpole")):
        assert [*lines(panes[f"epsilon-{x}"])] == [f"{preset}, seed {seed}: epsilon" for seed in (1, 2)]
    assert len(panes) == len({pane["win"] for pane in panes.values()}) == 1 + 6 + 6


def test_what_is_shown_has_a_new_revision_and_nothing_else_has(tmp_path: Path) -> None:
    homes = [write_run(tmp_path / name, 50, seed=seed) for seed, name in enumerate("ab")]
    views = views_of(homes)
    comparison = ComparisonView(views)

    def changed() -> set[str]:
        for view in views:
            view.update()
        before, now = dict(revisions), {key: revision for key, revision, _ in comparison.windows()}
        revisions.update(now)
        return {key for key in now if now[key] != before.get(key)}

    revisions: dict[str, object] = {}
    assert len(changed()) == 7
    assert changed() == set()
    with (homes[0] / "metrics.csv").open("a") as file:
        file.write("1,99000,,,,,,,,,0.5,,,,,,\n")  # nothing but an epsilon
    assert changed() == {"epsilon-frames"}
    with lock(homes[1]):
        assert changed() == {"runs"}
    write_run(homes[1], 50, seed=5)
    assert len(changed()) == 7, "it has another name"


def test_many_runs_take_turns_with_the_colours(tmp_path: Path) -> None:
    panes = compared(*(write_run(tmp_path / f"run{seed}", 5, seed=seed) for seed in range(10)))
    colors = [trace["line"]["color"] for trace in lines(panes["epsilon-frames"]).values()]
    assert colors == [*COLORS, *COLORS[:2]]


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
    held = server.windows(names[2])
    assert [*lines(held["epsilon-frames"]["content"])] == [f"gravitar, seed {seed}: epsilon" for seed in (1, 2)]
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
        comparison = said[2].rpartition("/")[2]
        assert "running" in server.windows(name)["run"]["content"]
        append_metrics(runs[1], *range(10, 30))
        wait_until(lambda: len(server.trace(name, "epsilon", "epsilon")[0]) == 30)
        wait_until(
            lambda: len(server.trace(comparison, "epsilon-frames", "gravitar, seed 2: epsilon")[0]) == 30,
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
