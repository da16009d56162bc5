"""The windows of a run by themselves: how it stands, what a chart without data says, axes, evaluations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from visdom_helpers import append_metrics, saved_at, write_run

from gravitar_dqn.config import to_dict
from gravitar_dqn.dashboard.board import Board
from gravitar_dqn.dashboard.panes import Pane, duration, log_axis, run_pane, state_of
from gravitar_dqn.dashboard.view import RunView
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.run.folder import lock
from gravitar_dqn.run.status import standing


def content(pane: Pane) -> str:
    return str(pane["data"][0]["content"])


def test_the_run_window_says_all_about_a_run_that_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 101, seed=7, total_steps=404_000, total_episodes=1_000)
    (run / "evaluations.csv").write_text("global_step,episodes,mean\n1000,2,310.5\n2000,4,290\n")
    said = content(run_pane(standing(run, running=True)))
    for fact in (
        "running",
        "ALE/Gravitar-v5",
        "gravitar, seed 7",
        "width:25.0%",
        "101,000 of 404,000",
        "50 of 1,000",
        "2.5 min",  # 100 ticks of 1.5 s
        "about 7.5 min",
        "276.7",
        "310.5",
    ):
        assert fact in said, fact


def test_the_run_window_has_a_word_and_a_colour_for_every_state(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, total_steps=20_000)
    seen = {}
    with lock(run):
        seen["running"] = run_pane(standing(run))
    seen["died"] = run_pane(standing(run))
    saved_at(run, 10_000)
    seen["stopped"] = run_pane(standing(run))
    append_metrics(run, *range(10, 20))
    saved_at(run, 20_000)
    seen["finished"] = run_pane(standing(run))
    for state, pane in seen.items():
        assert state_of({"run": {"content": content(pane)}}) == state
        assert f"&#9679; {state}<" in content(pane)
        assert ("about" in content(pane)) == (state == "running")
    colors = [content(pane).split("color:")[2][:7] for pane in seen.values()]
    assert len(set(colors)) == 4


@pytest.mark.parametrize("said", ["words", "<b data-state='odd'>", ""])
def test_a_run_window_of_somebody_else_says_no_state(said: str) -> None:
    assert state_of({"run": {"content": said}}) is None
    assert state_of({"text": {"content": "<b data-state='died'>"}}) is None


def test_the_run_window_escapes_what_people_wrote(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, env_id="<img src=x onerror=alert(1)>")
    assert "<img" not in content(run_pane(standing(run)))


@pytest.mark.parametrize("config", [None, "{", '{"config": {"preset": "randal", "of": "another version"}}'])
def test_a_run_that_cannot_be_read_has_its_window_all_the_same(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    view = RunView(tmp_path)
    view.update(running=True)
    windows = {key: make() for key, _, make in view.windows()}
    assert "cannot be read" in content(windows["run"])
    assert [*windows] == ["run", "score", "video", "speed", "buffer", "settings"]


def test_durations() -> None:
    assert [duration(minutes) for minutes in (0, 12.34, 99.9, 100, 185.4, 100_000)] == [
        "0.0 min",
        "12.3 min",
        "99.9 min",
        "1 h 40 min",
        "3 h 05 min",
        "1,666 h 40 min",
    ]


# Windows of every agent.


@pytest.mark.parametrize("preset", PRESETS)
def test_the_film_is_in_the_first_row_and_settings_come_last(tmp_path: Path, preset: str) -> None:
    view = RunView(write_run(tmp_path / "run", 1, preset))
    view.update()
    keys = [key for key, *_ in view.windows()]
    assert keys[:3] == ["run", "score", "video"]
    assert keys[-1] == "settings"
    if preset == "gravitar":
        assert len(keys) == 9


@pytest.mark.parametrize("preset", PRESETS)
def test_a_chart_without_data_says_when_there_will_be(preset: str) -> None:
    board = Board({"config": to_dict(PRESETS[preset]), "frames_per_step": 4, "metrics": ["td_loss", "policy_loss"]})
    said = {}
    for chart in board.charts:
        layout = board.pane(chart)["layout"]
        (note,) = layout["annotations"]
        said[chart.key] = note["text"]
        # Without a range: the page would keep it when there is data.
        assert not layout["xaxis"]["visible"] and layout["yaxis"] == {"visible": False, "fixedrange": True}
    assert said["score"] == "drawn when the first game ends"
    starts = {"gravitar": "20,000", "cartpole": "1,000", "ppo": "8,192", "randal": "46,592"}  # (128 + 600) x 64
    if preset in starts:
        assert said["loss"] == said["policy_loss"] == f"learning begins after {starts[preset]} steps"


def test_a_chart_with_data_has_axes_and_no_sentence() -> None:
    board = Board({"config": to_dict(PRESETS["gravitar"]), "frames_per_step": 4})
    board.add("metrics", {"global_step": 10, "td_loss": 0.02})
    layout = next(board.pane(chart) for chart in board.charts if chart.key == "loss")["layout"]
    assert "annotations" not in layout
    assert "visible" not in layout["yaxis"]
    assert (layout["yaxis"]["range"], layout["yaxis"]["dtick"]) == ([-2, -1], 1)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1))
def test_a_logarithmic_axis_has_whole_decades_around_the_data_and_few_ticks(values: list[float]) -> None:
    axis = log_axis([*values, 0.0, -1.0])
    low, high = axis["range"]
    assert 10.0**low <= min(values) * (1 + 1e-9) and max(values) <= 10.0**high * (1 + 1e-9)
    ticks = [decade for decade in range(low, high + 1) if decade % axis["dtick"] == 0]
    assert 1 <= len(ticks) <= 7


@pytest.mark.parametrize("values", [[], [0.0], [-1.0, 0.0]])
def test_a_logarithmic_axis_of_nothing_positive_has_a_decade_too(values: list[float]) -> None:
    assert log_axis(values) == {"range": [-1, 0], "dtick": 1}


# Evaluations during training.


def test_evaluations_are_a_line_of_the_score_where_there_will_be_some(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, eval_every=5_000)
    columns = "global_step,episodes,mean,std,median,iqm,iqm_low,iqm_high"
    (run / "evaluations.csv").write_text(f"{columns}\n5000,2,200,1,2,3,4,5\n")
    view = RunView(run)
    view.update()

    def line() -> dict[str, object]:
        pane = next(make() for key, _, make in view.windows() if key == "score")
        return next(trace for trace in pane["data"] if trace["name"] == "evaluation")

    assert (line()["x"], line()["y"], line()["mode"]) == ([20_000], [200], "markers")
    with (run / "evaluations.csv").open("a") as file:
        file.write("10000,4,250,1,2,3,4,5\n")
    view.update()
    assert (line()["x"], line()["y"], line()["mode"]) == ([20_000, 40_000], [200, 250], "lines+markers")
    without = Board({"config": to_dict(replace(PRESETS["gravitar"], eval_every=0))})
    assert "evaluation" not in json.dumps(without.pane(without.charts[0]))


def test_evaluations_of_the_notebook_are_where_their_episodes_are(tmp_path: Path) -> None:
    board = Board({"config": to_dict(replace(PRESETS["notebook"], eval_every=1_000))})
    board.add("evaluations", {"global_step": 1_000, "episodes": 25, "mean": 300})
    trace = next(trace for trace in board.pane(board.charts[0])["data"] if trace["name"] == "evaluation")
    assert (trace["x"], trace["y"]) == ([25], [300])
