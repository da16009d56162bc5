"""What is found out about runs by their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from visdom_helpers import METRICS, metrics_row, saved_at, write_run

from gravitar_dqn.errors import UserError
from gravitar_dqn.run.files import last_row
from gravitar_dqn.run.folder import is_held, lock
from gravitar_dqn.run.status import Evaluation, best_evaluation, find, find_one, runs_in, standing, table


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
    assert last_row(path) == {"a": "1", "b": "2"}, "a row with too few cells is no row"


def test_a_lock_is_seen_from_another_process_and_left_alone(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert not (tmp_path / "lock").exists(), "looking makes no file"
    code = "import sys; from pathlib import Path; from gravitar_dqn.run.folder import is_held; "
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
    (run / "checkpoints" / "latest").unlink()  # as a copy leaves it
    assert standing(run).state == "stopped"
    record = json.loads((run / "config.json").read_text())
    record["config"]["total_steps"] = 100_000
    (run / "config.json").write_text(json.dumps(record))
    assert standing(run).state == "finished"
    (run / "checkpoints" / "step_000000100000.pt").unlink()
    assert standing(run).state == "died", "its end was not saved"


def test_a_run_that_was_killed_at_once_has_died(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0)
    saved_at(run, 0)
    assert standing(run).state == "died"


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
    record["config"]["total_minutes"] = 1.0
    (run / "config.json").write_text(json.dumps(record))
    assert standing(run).progress == 1, "more than all is no more than all"
    assert (now.global_step, now.frames, now.episodes, now.label) == (101_000, 404_000, 50, "gravitar, seed 742")
    assert standing(run).minutes_left is None, "a run that does not go on has no end in sight"


def test_a_run_that_has_just_begun_has_no_score(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0)
    (run / "metrics.csv").unlink()
    now = standing(run)
    assert (now.mean_score, now.best, now.progress, now.minutes_left) == (None, None, 0, None)
    (run / "metrics.csv").write_text("\n".join([METRICS, metrics_row(0), ""]))
    assert standing(run).mean_score is None  # NaN


def test_the_best_evaluation_is_the_best_of_enough_games(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    assert best_evaluation(run) is None
    (run / "eval.json").write_text('{"mean": 500.0, "episodes": 3}')
    assert str(best_evaluation(run)) == "500.0 (3 games)", "better than nothing"
    (run / "evaluations.csv").write_text("global_step,episodes,games,mean\n1000,7,40,250\n2000,9,40,410.5\n3000,")
    assert best_evaluation(run) == standing(run).best == Evaluation(410.5, 40)
    (run / "eval_best.json").write_text('{"mean": 420.0, "episodes": 100}')
    (run / "eval_cut.json").write_text('{"mean": 999.0, "episodes": 100}')
    assert best_evaluation(run) == Evaluation(420.0, 100)
    (run / "eval_best.json").write_text("[damaged")
    assert best_evaluation(run) == Evaluation(410.5, 40)
    (run / "eval.json").write_text('{"mean": 500.0, "episodes": 20}')
    assert best_evaluation(run) == Evaluation(500.0, 20), "20 games are enough"


def test_a_damaged_folder_hides_no_other(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 3, "ppo"), write_run(tmp_path / "b", 3, "ppo")
    (a / "config.json").write_text("{")
    assert find(["ppo"], tmp_path) == [b]
    with (b / "metrics.csv").open("a") as file:
        file.write("nan," * 16 + "nan\n")
    assert standing(b).global_step == 0, "a number that is none counts as 0"


def test_a_name_may_be_cut_short(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"CartPole-v1__cartpole__{seed}__2026", 3) for seed in (1, 2, 3)]
    assert find_one("CartPole-v1__cartpole__2", tmp_path) == runs[1]
    with pytest.raises(
        UserError, match=r"^CartPole stands for 3 runs, name one of them: CartPole-v1__cartpole__1__2026, "
    ):
        find_one("CartPole", tmp_path)


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
    runs = [write_run(tmp_path / "a", 10), write_run(tmp_path / "longer", 1000, "ppo")]
    (runs[1] / "eval.json").write_text('{"mean": 1234.56, "episodes": 100}')
    assert table([standing(run) for run in runs]).splitlines() == [
        "run     preset    seed  state      steps  minutes  done  last 100      best evaluation",
        "a       gravitar   742  died      10,000      0.2    0%     189.0                    -",
        "longer  ppo        742  died   1,000,000     25.0   10%     909.4  1,234.6 (100 games)",
    ]
