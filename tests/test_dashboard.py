"""The dashboard's thread: what it draws, and that nothing a file or a server does stops it."""

from __future__ import annotations

import http.server
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import injected
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import spec_of_shape
from visdom_helpers import WINDOWS, Server, append_metrics, metrics_row, wait_until, write_run

from gravitar_dqn.agents import entry_of
from gravitar_dqn.config import to_dict
from gravitar_dqn.dashboard import connection, tail, view
from gravitar_dqn.dashboard.board import Board, Trace
from gravitar_dqn.dashboard.charts import Reduce
from gravitar_dqn.dashboard.panes import settings_pane
from gravitar_dqn.dashboard.registry import environment_name
from gravitar_dqn.dashboard.tail import CsvTail
from gravitar_dqn.dashboard.thread import Dashboard, pause
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.logs import show_log

REDUCE: dict[str, Callable[[list[float]], float]] = {"mean": lambda ys: math.fsum(ys) / len(ys), "max": max, "min": min}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dashboards tell the server of their runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def boards() -> Iterator[list[Dashboard]]:
    """Dashboards to close at the end, whatever the test found."""
    started: list[Dashboard] = []
    yield started
    for board in started:
        board.close(1.0)


def begin(boards: list[Dashboard], run_dir: Path, url: str, **more: Any) -> Dashboard:
    board = Dashboard(run_dir, url, period=0.1, **more)
    boards.append(board)
    board.start()
    return board


# What a trace keeps.


@given(
    st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=150),
    st.sampled_from(["mean", "max", "min"]),
    st.sampled_from([2, 4, 10, 32]),
)
def test_trace_equals_buckets_of_the_whole_history(ys: list[float], reduce: Reduce, capacity: int) -> None:
    trace = Trace(reduce, capacity)
    for x, y in enumerate(ys):
        trace.add(x, y)
    kept = [(x, y) for x, y in enumerate(ys) if math.isfinite(y)]
    size = 1
    while len(kept) > size * capacity:
        size *= 2
    buckets = [kept[i : i + size] for i in range(0, len(kept), size)]
    xs, values = trace.points()
    assert trace.count == len(kept)
    assert len(values) <= capacity
    assert xs == pytest.approx([math.fsum(x for x, _ in bucket) / len(bucket) for bucket in buckets], rel=1e-6)
    naive = [REDUCE[reduce]([y for _, y in bucket]) for bucket in buckets]
    assert values == pytest.approx(naive, rel=1e-6, abs=0.1)  # eight digits of 1e6, and means of means


# What is read of a file.


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(allow_nan=False)), max_size=20), st.lists(st.integers(1, 40))
)
@settings(max_examples=60, deadline=None)
def test_tail_reads_each_row_once_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "metrics.csv"
    text = "global_step,td_loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in rows)
    reader, seen, position = CsvTail(path), [], 0
    for length in [*cuts, len(text)]:
        with path.open("a") as file:
            file.write(text[position : position + length])
        position += length
        seen += reader.read() or []
    assert seen == [{"global_step": step, "td_loss": loss} for step, loss in rows]


def test_tail_leaves_a_torn_line_and_takes_it_whole_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    reader = CsvTail(path)
    assert reader.read() == []
    path.write_text("a,b\n1,2\n3,")
    assert reader.read() == [{"a": 1, "b": 2}]
    assert reader.read() == []
    path.write_text("a,b\n1,2\n3,\n5,x\n")
    second, third = reader.read() or []
    assert second["a"] == 3
    assert third["a"] == 5
    assert math.isnan(second["b"])
    assert math.isnan(third["b"])


@pytest.mark.parametrize("how", ["shortened", "replaced", "rewritten longer", "deleted"])
def test_tail_notices_a_file_that_is_not_the_same(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("a\n1\n2\n3\n")
    reader = CsvTail(path)
    assert len(reader.read() or []) == 3
    if how == "shortened":
        path.write_text("a\n1\n")
    elif how == "replaced":
        (tmp_path / "new").write_text("a\n1\n2\n3\n")
        (tmp_path / "new").rename(path)
    elif how == "rewritten longer":
        path.write_text("a\n1\n7\n8\n9\n")
    else:
        path.unlink()
    assert reader.read() is None


def test_tail_reads_a_long_history_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 100)
    path = tmp_path / "metrics.csv"
    path.write_text("a\n" + "".join(f"{i}\n" for i in range(1000)))
    reader, portions = CsvTail(path), []
    while rows := reader.read():
        portions.append([row["a"] for row in rows])
    assert len(portions) > 30
    assert [row for portion in portions for row in portion] == list(range(1000))


# What is shown.


def board_of(preset: str, frames_per_step: int = 4) -> Board:
    return Board(record_of(PRESETS[preset], frames_per_step))


def record_of(config: Any, frames_per_step: int = 4) -> dict[str, Any]:
    """config.json, as far as the board looks at it."""
    small = replace(config, env=replace(config.env, num_envs=2))
    if hasattr(config, "tasks"):
        small = replace(small, tasks=replace(config.tasks, replay_length=100))
    spec = spec_of_shape((4,) if config.env.id == "CartPole-v1" else (4, 84, 84))
    agent = entry_of(small).make(small, spec, torch.device("cpu"))
    return {"config": to_dict(config), "frames_per_step": frames_per_step, "metrics": list(agent.measured)}


def lines_of(board: Board, window: str) -> dict[str, tuple[list[float], list[float]]]:
    pane = next(board.pane(chart) for chart in board.charts if chart.key == window)
    return {trace["name"]: (trace["x"], trace["y"]) for trace in pane["data"]}


def test_frames_and_percent_for_atari_and_steps_for_others() -> None:
    row = {"global_step": 1000.0, "sps": 600.0, "buffer_fill": 0.25, "samples_per_second": 50.0}
    atari, other = board_of("breakout", 4), board_of("cartpole", 1)
    for board in (atari, other):
        board.add("metrics", row)
        assert lines_of(board, "buffer")["fill"][1] == [25]
        assert lines_of(board, "speed")["samples/s learning"][1] == [50]
    assert lines_of(atari, "speed")["frames/s acting"] == ([4000], [2400])
    assert lines_of(other, "speed")["steps/s acting"] == ([1000], [600])
    assert (atari.xlabel, other.xlabel) == ("frames", "environment steps")


def test_notebook_marks_average_max_and_min_every_hundred_episodes() -> None:
    board = board_of("notebook")
    for score in range(201):
        board.add("episodes", {"episodic_return": float(score)})
    board.add("metrics", {"global_step": 9e9, "episodes": 200, "rnd_loss": 0.5})
    assert [chart.title for chart in board.charts] == [
        "Score",
        "Average Intrinsic Reward",
        "Epsilon",
        "RND Loss",
        "Network Loss",
        "Expected Return",
    ]
    scores = lines_of(board, "score")
    assert list(scores) == ["val", "average", "max", "min"]
    assert scores["val"] == (list(range(201)), list(range(201)))
    assert scores["average"] == ([0, 100, 200], [0, 50.5, 150.5])
    assert scores["max"] == ([0, 100, 200], [0, 100, 200])
    assert scores["min"] == ([0, 100, 200], [0, 1, 101])
    assert lines_of(board, "rnd_loss")["loss"] == ([200], [0.5])


OF_CURIOSITY = "int_reward_mean int_reward_max rnd_loss value_loss_int explained_variance_int int_return_mean".split()
NEVER = {  # what a preset's agent cannot compute
    "randal": [],
    "randal-cartpole": ["pixel_control_loss"],
    "ppo-rnd": ["pixel_control_loss", "reward_prediction_loss", "value_replay_loss"],
    "ppo": ["pixel_control_loss", "reward_prediction_loss", "value_replay_loss", *OF_CURIOSITY],
}


@pytest.mark.parametrize("preset", NEVER)
def test_ppo_has_a_line_for_all_that_it_can_compute_and_for_nothing_else(preset: str) -> None:
    record = record_of(PRESETS[preset])
    board = Board(record)
    columns = {line.column for chart in board.charts for line in chart.lines if line.source == "metrics"}
    assert not columns & {"td_loss", "q_mean", "epsilon", *NEVER[preset]}
    assert set(record["metrics"]) - columns == {"learning_rate"}
    board.add("metrics", {"global_step": 10, "approx_kl": 0.01, "clip_fraction": 0.2, "policy_loss": -0.5})
    assert lines_of(board, "change")["clipped share"][1] == [0.2]
    assert lines_of(board, "policy_loss")["loss"][1] == [-0.5]


@pytest.mark.parametrize(("preset", "curious"), [("gravitar", False), ("gravitar", True), ("notebook", False)])
def test_a_dqn_without_curiosity_has_no_line_for_it(preset: str, curious: bool) -> None:
    config = PRESETS[preset]
    config = replace(config, rnd=replace(config.rnd, coef=0.1 if curious else 0.0))
    board = Board(record_of(config))
    columns = {line.column for chart in board.charts for line in chart.lines}
    assert columns & {*OF_CURIOSITY} == ({"int_reward_mean", "int_reward_max", "rnd_loss"} if curious else set())
    assert "td_loss" in columns


def test_panes_are_strict_json_whatever_the_cells_hold() -> None:
    board = board_of("gravitar")
    board.add("metrics", {"global_step": 1, "td_loss": math.inf, "rnd_loss": math.nan, "q_mean": -math.inf})
    board.add("metrics", {"global_step": math.nan, "td_loss": 1.0})
    for chart in board.charts:
        json.dumps(board.pane(chart), allow_nan=False)
    assert lines_of(board, "loss") == {"TD": ([], [])}


@pytest.mark.parametrize("record", [{}, {"metrics": None}, {"config": {"preset": "randal", "of": "another version"}}])
def test_a_run_whose_settings_cannot_be_read_has_the_windows_that_all_have(record: dict[str, Any]) -> None:
    assert [chart.key for chart in Board(record).charts] == ["score", "speed", "buffer"]


def test_settings_are_escaped_and_tell_runs_apart_first() -> None:
    settings = {
        "config": {"a": {"b": "<script>1</script>"}, "seed": 7},
        "commit": "<i>",
        "device": "cpu",
        "preset": "p",
    }
    content = settings_pane(settings)["data"][0]["content"]
    assert "<script>" not in content
    assert "&lt;script&gt;" in content
    places = [content.index(f">{name}<") for name in ("preset", "seed", "device", "commit", "a.b")]
    assert places == sorted(places)


def test_environment_names_are_safe_and_never_shared() -> None:
    names = [
        environment_name(Path(name)) for name in ("a_b", "a-b", "x/a_b", "main", "é+ü", "ALE/G__p__1__2", ".hidden")
    ]
    assert len(set(names)) == len(names)
    assert "main" not in names
    assert all(set(name).isdisjoint("_/+ ") and name.isascii() and name[0].isalnum() for name in names)
    assert environment_name(Path("a_b")) == environment_name(Path.cwd() / "a_b")


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://x:y", "http://x:0", "", "no"])
def test_a_bad_address_is_named(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="is not a server's address"):
        Dashboard(tmp_path, address)


# With a server.


@pytest.mark.faults
def test_history_comes_back_after_the_server_was_killed(
    tmp_path: Path, server: Server, boards: list[Dashboard]
) -> None:
    injected("Visdom killed and back")
    run = write_run(tmp_path / "run", 2000)
    board = begin(boards, run, server.url)
    wait_until(lambda: list(server.windows(board.environment)) == WINDOWS)
    before = server.trace(board.environment, "epsilon", "epsilon")
    assert len(before[0]) == 500  # 2000 ticks in buckets of 4
    server.kill()
    append_metrics(run, *range(2000, 2400))
    time.sleep(0.3)
    server.start()
    wait_until(lambda: list(server.windows(board.environment)) == WINDOWS)
    xs, ys = server.trace(board.environment, "epsilon", "epsilon")
    assert len(xs) == 600
    assert (xs[:500], ys[:500]) == before
    assert xs[-1] == pytest.approx(4 * 2398.5 * 1000)


@pytest.mark.faults
def test_a_stopped_server_holds_nobody_and_drawing_goes_on_after_it(
    tmp_path: Path, server: Server, boards: list[Dashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected("Visdom hanging")
    monkeypatch.setattr(connection, "READ_TIMEOUT", 0.5)
    run = write_run(tmp_path / "run", 10)
    board, other = begin(boards, run, server.url), begin(boards, run, server.url)
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 10)
    server.signal(signal.SIGSTOP)
    try:
        append_metrics(run, 10)
        time.sleep(1.2)  # longer than the read timeout
        started = time.monotonic()
        other.close(0.3)
        assert time.monotonic() - started < 0.6
    finally:
        server.signal(signal.SIGCONT)
    append_metrics(run, 11)
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 12)


def test_close_draws_the_last_rows_and_saves_them(tmp_path: Path, server: Server, boards: list[Dashboard]) -> None:
    run = write_run(tmp_path / "run", 10)
    board = Dashboard(run, server.url, period=1000)
    boards.append(board)
    board.start()
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 10)
    append_metrics(run, 10)
    board.close()
    assert len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 11
    server.kill()
    server.start()  # a finished run is still there
    assert len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 11


def test_a_resume_that_cuts_the_files_is_drawn_anew(tmp_path: Path, server: Server, boards: list[Dashboard]) -> None:
    run = write_run(tmp_path / "run", 100)
    board = begin(boards, run, server.url)
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 100)
    write_run(run, 60)
    append_metrics(run, 60)
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 61)
    assert server.trace(board.environment, "epsilon", "epsilon")[0][-1] == 4 * 61_000


def test_files_may_appear_late_and_lines_in_halves(tmp_path: Path, server: Server, boards: list[Dashboard]) -> None:
    board = begin(boards, tmp_path / "run", server.url, video_dir=tmp_path / "videos")
    wait_until(
        lambda: list(server.windows(board.environment)) == ["run", "score", "video", "speed", "buffer", "settings"]
    )
    run = write_run(tmp_path / "run", 5)  # it tells which windows there are, and their order is their place
    wait_until(lambda: list(server.windows(board.environment)) == WINDOWS)
    with (run / "metrics.csv").open("a") as file:
        file.write(metrics_row(5)[:30])
        file.flush()
        wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 5)
        file.write(metrics_row(5)[30:] + "\n")
    wait_until(lambda: len(server.trace(board.environment, "epsilon", "epsilon")[0]) == 6)
    assert server.trace(board.environment, "loss", "TD")[1][5] == pytest.approx(float(metrics_row(5).split(",")[11]))


def test_runs_side_by_side_and_other_peoples_windows(tmp_path: Path, server: Server, boards: list[Dashboard]) -> None:
    foreign = {"data": [{"type": "text", "content": "mine"}], "win": "score", "layout": {}, "opts": {}}
    for environment in ("main", "somebody", "run"):
        server.post("events", {**foreign, "eid": environment})
    one = begin(boards, write_run(tmp_path / "a" / "run", 10), server.url)
    two = begin(boards, write_run(tmp_path / "b" / "run", 20, env_id="CartPole-v1"), server.url)
    wait_until(lambda: len(server.trace(one.environment, "epsilon", "epsilon")[0]) == 10)
    wait_until(lambda: len(server.trace(two.environment, "epsilon", "epsilon")[0]) == 20)
    assert server.trace(one.environment, "epsilon", "epsilon")[0][-1] == 40_000
    assert server.trace(two.environment, "epsilon", "epsilon")[0][-1] == 20_000
    one.close()
    two.close()
    assert set(server.post("env_state", {})) == {"main", "somebody", "run", one.environment, two.environment}
    for environment in ("main", "somebody", "run"):
        assert [held["content"] for held in server.windows(environment).values()] == ["mine"]


def test_the_newest_video_of_bearable_size_is_shown(
    tmp_path: Path, server: Server, boards: list[Dashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "LARGEST_VIDEO", 10)
    videos = tmp_path / "videos"
    board = begin(boards, write_run(tmp_path / "run", 5), server.url, video_dir=videos)
    wait_until(
        lambda: "drawn when one is filmed: every 25 games" in str(server.windows(board.environment).get("video"))
    )
    videos.mkdir()
    for age, (name, size) in enumerate(
        [
            ("episode_000050_score_-21.0.mp4", 10),
            ("episode_000025_score_700.mp4", 5),
            ("episode_000075_score_9.mp4", 11),
            ("a.mp4", 3),
        ]
    ):
        (videos / name).write_bytes(b"m" * size)
        os.utime(videos / name, (1e9 - age, 1e9 - age))
    wait_until(lambda: "episode 50, score -21.0" in str(server.windows(board.environment)["video"]))
    (videos / "episode_000100_score_800.mp4").write_bytes(b"m")
    wait_until(lambda: "episode 100, score 800" in str(server.windows(board.environment)["video"]))


# Without one.


@pytest.mark.faults
def test_no_server_costs_nothing_and_is_said_once(
    tmp_path: Path, boards: list[Dashboard], capfd: pytest.CaptureFixture[str]
) -> None:
    injected("Visdom absent")
    show_log()
    board = Dashboard(write_run(tmp_path / "run", 5), "http://127.0.0.1:9", period=0.01)
    boards.append(board)
    board.start()
    time.sleep(0.6)
    started = time.monotonic()
    board.close()
    assert time.monotonic() - started < 1
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("warning: the dashboard is not drawn yet: http://127.0.0.1:9: ")


def test_pauses_grow_with_trouble_and_end_soon_after_it() -> None:
    assert [pause(1, failures, 3) for failures in (1, 2, 3, 4, 5, 100_000)] == [1, 2, 4, 8, 10, 10]
    assert [pause(1, 0, took) for took in (0.01, 0.1, 5)] == [1, 2, 10]


def test_a_dashboard_that_never_started_can_be_closed(tmp_path: Path) -> None:
    Dashboard(tmp_path, "127.0.0.1:9").close()


@pytest.mark.parametrize(("status", "answer"), [(200, b"something else"), (403, b"no"), (500, b"run")])
@pytest.mark.faults
def test_windows_are_sent_again_until_the_server_takes_them(
    tmp_path: Path, boards: list[Dashboard], status: int, answer: bytes
) -> None:
    injected("Visdom answering rubbish or an error")
    asked: list[str] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            drawn = self.path == "/events"
            if drawn:
                asked.append(message["win"])
            said = answer if drawn else b"[]"  # it has no environments
            self.send_response(status if drawn else 200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        begin(boards, write_run(tmp_path / "run", 5), f"http://127.0.0.1:{fake.server_port}")
        wait_until(lambda: len(asked) >= 2)
        fake.shutdown()
    assert set(asked) == {"run"}
