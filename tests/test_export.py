"""TensorBoard's event files hold what a run's CSV files hold, once."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import CARTPOLE, rows, train

from gravitar_dqn.config import to_dict
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import get_preset
from gravitar_dqn.tools.export import OURS, export_tensorboard, section_of

START = 1_600_000_000.0
METRICS = "wall_seconds global_step frames return_mean td_loss epsilon int_reward_max".split()
EVALUATIONS = "global_step episodes mean std median iqm iqm_low iqm_high".split()


def write_csv(path: Path, columns: list[str], table: list[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *table])


def make_run(run_dir: Path, *, evaluations: bool = True) -> Path:
    """Two rows of metrics, at 10 and 30 seconds; three games, two of which end at the same step."""
    run_dir.mkdir(parents=True)
    record = {"preset": "gravitar", "config": to_dict(get_preset("gravitar")), "versions": {"torch": "9.9"}}
    (run_dir / "config.json").write_text(json.dumps(record))
    metrics = [(10, 1000, 4000, "", "nan", 0.9, ""), (30, 2000, 8000, 250.5, 0.125, 0.8, "inf")]
    write_csv(run_dir / "metrics.csv", METRICS, metrics)
    games = "global_step episodic_return episodic_length".split()
    write_csv(run_dir / "episodes.csv", games, [(500, 100, 50), (1500, 250, 70), (1500, 300, 71)])
    if evaluations:  # a resume from step 1000 played on from there
        values = [(2000, 100, 300, 1, 2, 310, 290, 330), (1800, 100, 200, 1, 2, 210, 190, 230)]
        write_csv(run_dir / "evaluations.csv", EVALUATIONS, values)
    os.utime(run_dir / "config.json", (START, START))
    os.utime(run_dir / "metrics.csv", (START + 31, START + 31))
    return run_dir


def events(home: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, seconds since START and value of every scalar that TensorBoard finds in a folder, by tag."""
    found = loaded(home)
    return {
        tag: [(event.step, event.wall_time - START, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def loaded(home: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(home), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_finds_every_finite_cell_at_its_step_and_time(tmp_path: Path) -> None:
    home = export_tensorboard(make_run(tmp_path / "run"))
    assert home == tmp_path / "run" / "tensorboard"
    found = events(home)
    assert found.pop("score/episodic_return") == [(500, 5, 100), (1500, 20, 250), (1500, 20, 300)]
    assert found.pop("score/episodic_length") == [(500, 5, 50), (1500, 20, 70), (1500, 20, 71)]
    assert found.pop("score/return_mean") == [(2000, 30, 250.5)]
    assert found.pop("losses/td_loss") == [(2000, 30, 0.125)], "NaN is left out"
    assert found.pop("progress/frames") == [(1000, 10, 4000), (2000, 30, 8000)]
    assert found.pop("progress/wall_seconds") == [(1000, 10, 10), (2000, 30, 30)]
    assert found.pop("exploration/epsilon") == [(1000, 10, pytest.approx(0.9)), (2000, 30, pytest.approx(0.8))]
    assert found.pop("evaluation/mean") == [(1800, 26, 200), (2000, 30, 300)], "in the order of their steps"
    assert {*found} == {f"evaluation/{name}" for name in EVALUATIONS[1:] if name != "mean"}


def test_the_settings_are_there_as_text(tmp_path: Path) -> None:
    found = loaded(export_tensorboard(make_run(tmp_path / "run")))
    (event,) = found.Tensors("settings/text_summary")
    text = event.tensor_proto.string_val[0].decode().splitlines()
    assert {"| env.id | ALE/Gravitar-v5 |", "| seed | 742 |", "| versions.torch | 9.9 |"} <= {*text}
    assert event.wall_time == START


def test_exporting_again_replaces_what_was_exported_and_nothing_else(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", evaluations=False)
    home = export_tensorboard(run_dir)
    strangers = [home / "events.out.tfevents.1.else", home / "notes.txt", home / f"report{OURS}"]
    for path in strangers:
        path.write_bytes(b"")
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("40,3000,12000,260,0.25,0.7,\n50,40")  # and half a row
    assert export_tensorboard(run_dir) == home
    assert len([*home.iterdir()]) == 1 + len(strangers) and all(path.exists() for path in strangers)
    for path in strangers:
        path.unlink()
    assert [step for step, _, _ in events(home)["progress/frames"]] == [1000, 2000, 3000]


def test_an_export_that_fails_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run")
    home = export_tensorboard(run_dir)
    before = {path: path.read_bytes() for path in home.iterdir()}

    def fail(values: object) -> str:
        (home / "somebody else's").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr("gravitar_dqn.tools.export.as_table", fail)
    with pytest.raises(KeyboardInterrupt):
        export_tensorboard(run_dir)
    before |= {home / "somebody else's": b""}
    assert {path: path.read_bytes() for path in home.iterdir()} == before


def test_runs_can_be_exported_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        home = export_tensorboard(make_run(tmp_path / "runs" / name), tmp_path / "logs")
        assert home == tmp_path / "logs" / name and events(home)
    assert not [*(tmp_path / "runs").rglob("tensorboard")]
    monkeypatch.chdir(tmp_path / "runs" / "b")
    assert export_tensorboard(Path(), tmp_path / "others") == tmp_path / "others" / "b"


def test_times_of_a_resumed_and_of_a_copied_run_are_those_of_one_without_a_break(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    os.utime(run_dir / "config.json", (START + 20, START + 20))  # written anew by the resume
    os.utime(run_dir / "metrics.csv", (START + 30, START + 30))
    frames = events(export_tensorboard(run_dir))["progress/frames"]
    assert [seconds for _, seconds, _ in frames] == [10, 30]


def test_columns_are_in_the_sections_that_their_names_say() -> None:
    told = {
        name: section_of(name)
        for name in "sps value_loss_int int_return_mean explained_variance_int entropy q_mean".split()
    }
    assert told == {
        "sps": "speed",
        "value_loss_int": "losses",
        "int_return_mean": "curiosity",
        "explained_variance_int": "curiosity",
        "entropy": "exploration",
        "q_mean": "learning",
    }


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere is not a run's folder"):
        export_tensorboard(Path("nowhere"))
    run_dir = make_run(tmp_path / "run")
    (run_dir / "evaluations.csv").write_text("global_step,mean\n100,much\n")
    with pytest.raises(UserError, match=r"evaluations\.csv cannot be read: could not convert string to float: 'much'"):
        export_tensorboard(run_dir)
    (run_dir / "evaluations.csv").write_text("global_step,mean\n,1\n")
    with pytest.raises(UserError, match=r"evaluations\.csv cannot be read: a row has no global_step"):
        export_tensorboard(run_dir)
    empty = make_run(tmp_path / "empty")
    for name in ("metrics", "episodes", "evaluations"):
        (empty / f"{name}.csv").unlink()
    with pytest.raises(UserError, match="empty has no rows yet: there is nothing to export"):
        export_tensorboard(empty)
    (run_dir / "evaluations.csv").unlink()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"there is no TensorBoard: pip install -e '\.\[tensorboard\]' brings it"):
        export_tensorboard(run_dir)
    assert not [*tmp_path.rglob("tensorboard")]


def test_a_real_run_is_exported_cell_by_cell(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-episodes", 8, "--run-dir", run_dir) == 0
    found = events(export_tensorboard(run_dir))
    for name in ("metrics", "episodes"):
        table = rows(run_dir / f"{name}.csv")
        for column in table[0]:
            cells = [(row["global_step"], row[column]) for row in table if math.isfinite(row[column])]
            told = [(step, value) for step, _, value in found.get(f"{section_of(column)}/{column}", [])]
            if column != "global_step":
                assert told == [(step, pytest.approx(value)) for step, value in cells], column
    assert len(found["score/episodic_return"]) == 8
