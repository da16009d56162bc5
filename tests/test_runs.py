"""What is found out about runs by their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from visdom_helpers import METRICS, metrics_row, write_run

from gravitar_dqn.errors import UserError
from gravitar_dqn.files import last_row
from gravitar_dqn.run_dir import is_held, lock
from gravitar_dqn.runs import best_score, find, runs_in, standing, table


def saved_at(run_dir: Path, step: int) -> None:
    """A checkpoint's name, without a checkpoint."""
    home = run_dir / "checkpoints"
    home.mkdir(exist_ok=True)
    (home / f"step_{step:012d}.pt").touch()
    (home / "latest").unlink(missing_ok=True)
    (home / "latest").symlink_to(f"step_{step:012d}.pt")


def test_the_last_row_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert last_row(path) == {}
    path.write_text("a,b\n")
    assert last_row(path) == {}
    path.write_text("a,b\n1,2\n3,")
    assert last_row(path) == {"a": "1", "b": "2"}
    path.write_text("a,b\n" + "".join(f"{i},{2 * i}\n" for i in range(30_000)))
    assert last_row(path) == {"a": "29999", "b": "59998"}
    path.write_text("a,b\n1,2\n3\n")
    assert last_row(path) == {}, "a row with too few cells is no row"


def test_a_lock_is_seen_from_another_process_and_left_alone(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert not (tmp_path / "lock").exists(), "looking makes no file"
    code = "import sys; from pathlib import Path; from gravitar_dqn.run_dir import is_held; "
    code += "print(is_held(Path(sys.argv[1])))"
    with lock(tmp_path):
        said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == "True"
        (tmp_path / "kept").touch()  # else the folder would be cleared
    assert not is_held(tmp_path)


def test_the_state_is_told_by_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 100)  # 100 000 of 10 000 000 steps
    saved_at(run, 90_000)
    assert standing(run).state == "died"
    with lock(run):
        assert standing(run).state == "running"
        assert standing(run, running=False).state == "died"
    saved_at(run, 100_000)
    assert standing(run).state == "stopped"
    record = json.loads((run / "config.json").read_text())
    record["config"]["total_steps"] = 100_000
    (run / "config.json").write_text(json.dumps(record))
    assert standing(run).state == "finished"


def test_progress_is_that_of_the_nearest_limit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 101)  # 150 seconds, 50 games
    record = json.loads((run / "config.json").read_text())
    for name, value, progress in (
        ("total_episodes", 100, 0.5),
        ("total_minutes", 3.0, 150 / 180),
        ("total_steps", 101_000, 1),
    ):
        record["config"][name] = value
        (run / "config.json").write_text(json.dumps(record))
        assert standing(run).progress == pytest.approx(progress)
    record["config"]["total_steps"] = 202_000
    (run / "config.json").write_text(json.dumps(record))
    with lock(run):
        now = standing(run)
    assert now.minutes_left == pytest.approx(0.5)  # 150 of 180 seconds are over
    assert (now.global_step, now.frames, now.episodes, now.label) == (101_000, 404_000, 50, "gravitar, seed 742")
    assert standing(run).minutes_left is None, "a run that does not go on has no end in sight"


def test_a_run_that_has_just_begun_has_no_score(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0)
    (run / "metrics.csv").unlink()
    now = standing(run)
    assert (now.mean_score, now.best, now.progress, now.minutes_left) == (None, None, 0, None)
    (run / "metrics.csv").write_text("\n".join([METRICS, metrics_row(0), ""]))
    assert standing(run).mean_score is None  # NaN


def test_the_best_evaluation_is_the_best_of_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    assert best_score(run) is None
    (run / "eval.json").write_text('{"mean": 300.0}')
    (run / "evaluations.csv").write_text("global_step,mean\n1000,250\n2000,410.5\n3000,")
    assert best_score(run) == standing(run).best == 410.5
    (run / "eval.json").write_text("[damaged")
    assert standing(run).best == 410.5


def test_runs_are_found_by_folder_name_and_preset(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    a, b, c = (write_run(home / name, 3, preset) for name, preset in (("a", "gravitar"), ("b", "ppo"), ("c", "ppo")))
    for age, run in enumerate((c, b, a)):
        os.utime(run / "config.json", (1_000 + age, 1_000 + age))
    assert runs_in(home) == [c, b, a], "the newest last"
    assert find([str(b)], home) == find(["b"], home) == [b]
    assert find(["ppo"], home) == [c, b]
    assert find(["a", "ppo", "b"], home) == [a, c, b], "each once"
    assert find([home], tmp_path / "nowhere") == [c, b, a]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("randal", "no run of the preset randal"),
        ("first-rum", "did you mean first-run"),
        ("nothing", "nothing is no run"),
        ("empty", "empty is not a run's folder, and there is none in it"),
    ],
)
def test_what_is_no_run_is_named(word: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/first-run"), 3)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=named):
        find([word])


def test_the_table_has_a_line_for_each_run(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 10), write_run(tmp_path / "longer", 10, "ppo")]
    (runs[1] / "eval.json").write_text('{"mean": 1234.56}')
    heading, first, second = table([standing(run) for run in runs]).splitlines()
    assert heading.split() == ["run", "preset", "seed", "state", "steps", "minutes", "done", "last", "100", "best"]
    assert first.split()[:6] == ["a", "gravitar", "742", "died", "10,000", "0.2"]
    assert second.split()[-1] == "1,234.6"
    assert len({line.index("died") for line in (first, second)}) == 1
