"""Evaluations while a run trains: the order and its answer, the best checkpoint, and what may go wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_helpers import CARTPOLE, refusal, rows, train

from gravitar_dqn.cli import commands
from gravitar_dqn.cli.arguments import EvaluateArguments
from gravitar_dqn.errors import Interrupted
from gravitar_dqn.evaluation import evaluator
from gravitar_dqn.evaluation.background import Worker
from gravitar_dqn.evaluation.evaluator import Evaluator
from gravitar_dqn.evaluation.trained_agent import from_run
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import load_run
from gravitar_dqn.run.status import Evaluation, best_evaluation


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 60 steps."""
    assert train(*CARTPOLE, "--total-steps", 60, "--run-dir", tmp_path / "run") == 0
    return tmp_path / "run"


class Answers(Worker):
    """A worker that answers at once with the means that it is told to find."""

    means: list[float]

    def __init__(self, *words: str) -> None:
        super().__init__(*words)
        self.orders: list[dict[str, Any]] = []

    def order(self, order: dict[str, Any]) -> None:
        assert not self.busy
        assert Path(order["checkpoint"]).exists()
        self.orders.append(order)
        self.busy = True

    def answer(self, timeout: float = 0.0) -> dict[str, Any] | None:
        self.busy = False
        mean = self.means.pop(0)
        numbers = {"std": 1.0, "median": mean, "iqm": mean, "iqm_ci95": [mean - 1, mean + 1], "games": 7}
        return {**numbers, "mean": mean, "global_step": AGENT.global_step, "episodes": self.orders[-1]["episodes"]}


AGENT: Any = SimpleNamespace(global_step=0, episodes=250)


def make(run_dir: Path, *means: float, every: int = 100, resumed: bool = False) -> Evaluator:
    Answers.means = list(means)
    config = replace(load_run(run_dir), eval_every=every, eval_episodes=7)
    return Evaluator(run_dir, config, AGENT, lambda: checkpoint.load(run_dir), resumed=resumed)


def play_to(made: Evaluator, *steps: int) -> None:
    for step in steps:
        AGENT.global_step = step
        made.step([])


def best_at(run_dir: Path) -> str:
    home = checkpoint.folder(run_dir)
    assert [path.name for path in home.glob("best_*.pt")] == [(home / "best").resolve().name], "one is kept"
    return (home / "best").resolve().stem


def test_every_so_many_steps_and_the_best_stays(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    caplog.set_level(logging.INFO, "gravitar_dqn")
    AGENT.global_step = 60
    made = make(run_dir, 20.0, 50.0, 30.0)
    worker: Any = made._worker
    play_to(made, 61, 99)
    assert worker.orders == []
    play_to(made, 103, 110)  # ordered, collected
    assert best_at(run_dir) == "best_000000000110"
    play_to(made, 199, 200, 201)
    assert best_at(run_dir) == "best_000000000201"
    play_to(made, 450, 451, 460)  # what was missed is not made up for
    assert best_at(run_dir) == "best_000000000201", "a worse one took its place"
    assert len(worker.orders) == 3
    assert [row["mean"] for row in rows(run_dir / "evaluations.csv")] == [20, 50, 30]
    expected = {"global_step": 201, "episodes": 250, "games": 7, "mean": 50, "std": 1, "median": 50}
    assert rows(run_dir / "evaluations.csv")[1] == {**expected, "iqm": 50, "iqm_low": 49, "iqm_high": 51}
    assert best_evaluation(run_dir) == Evaluation(50.0, 7)
    assert caplog.records[-1].getMessage() == "evaluated after 451 steps: mean 30.0"
    made.close()
    assert not list(checkpoint.folder(run_dir).glob("candidate*"))


def test_a_resume_knows_the_best_so_far(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    play_to(made := make(run_dir, 40.0), 100, 101)
    made.close()
    AGENT.global_step = 60  # killed: it goes on from an older checkpoint
    play_to(made := make(run_dir, 30.0, 45.0, resumed=True), 100, 102)
    assert best_at(run_dir) == "best_000000000101"
    play_to(made, 200, 203)
    assert best_at(run_dir) == "best_000000000203"
    assert [row["mean"] for row in rows(run_dir / "evaluations.csv")] == [40, 30, 45]


def test_a_full_disk_leaves_one_evaluation_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    made = make(run_dir, 20.0)

    def full(path: Path, state: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        play_to(made, 100)
    assert "an evaluation after 100 steps is left out" in caplog.text
    assert made._ordered != 100, "the end would take it for evaluated"
    play_to(made, 101, 200, 201)
    assert best_at(run_dir) == "best_000000000201"


def wait_for(made: Evaluator, what: Any) -> None:
    deadline = time.monotonic() + 90
    while not what():
        made.step([])
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_process_plays_whole_games(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gravitar_dqn")
    AGENT.global_step = 60
    made = make(run_dir, every=30)
    play_to(made, 90)
    wait_for(made, lambda: not made._worker.busy)
    (row,) = rows(run_dir / "evaluations.csv")
    assert (row["global_step"], row["games"]) == (60, 7), "the step is that of the checkpoint's agent"
    assert row["mean"] >= 8, "a CartPole game lasts at least 8 steps"
    assert from_run(run_dir, "best").global_step == 60
    process = made._worker._process
    assert process is not None
    if sys.platform == "linux":
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    assert os.getsid(process.pid) == os.getsid(0), "of a session of its own, idle priority would mean nothing to us"
    assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C would reach it"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    play_to(made, 120)
    wait_for(made, lambda: "no more evaluations: " in caplog.text)
    play_to(made, 150)  # training goes on
    assert caplog.text.count("no more evaluations") == 1
    made.close()


def test_closing_ends_the_process(run_dir: Path) -> None:
    AGENT.global_step = 60
    made = make(run_dir, every=30)
    play_to(made, 90)
    process = made._worker._process
    assert process is not None and process.poll() is None
    made.close()
    assert process.poll() is not None


def test_a_run_with_evaluations(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(Answers):
        def answer(self, timeout: float = 0.0) -> dict[str, Any] | None:
            self.busy = False
            return evaluator._evaluate(self.orders[-1])

    monkeypatch.setattr(evaluator, "Worker", AtOnce)
    run = tmp_path / "evaluated"
    words = [*CARTPOLE, "--eval-every", 100, "--eval-episodes", 3, "--total-steps", 450, "--run-dir", run]
    assert train(*words) == 0
    assert [row["global_step"] for row in rows(run / "evaluations.csv")] == [100, 200, 300, 400, 450], "the last too"
    best = max(rows(run / "evaluations.csv"), key=lambda row: row["mean"])
    assert checkpoint.read(checkpoint.find(run, "best"))["agent"]["clocks"]["global_step"] == best["global_step"]
    words = [str(run), "--episodes", "2"]
    assert commands.run(commands.evaluate_command, [*words, "--checkpoint", "best"], "evaluate.py") == 0
    assert (run / "eval_best.json").exists()
    kept = sorted(checkpoint.folder(run).glob("step_*.pt"))[0]
    for name in (kept, kept.name, kept.stem):
        assert commands.run(commands.evaluate_command, [*words, "--checkpoint", str(name)], "evaluate.py") == 0
        played = json.loads((run / f"eval_{kept.stem}.json").read_text())
        assert played["frames_trained"] == checkpoint.read(kept)["agent"]["clocks"]["global_step"] < 450
    assert not (run / "eval.json").exists()


def test_another_runs_checkpoint_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted(checkpoint.folder(run_dir).glob("step_*.pt"))[-1]
    other = tmp_path / "other.pt"
    shutil.copy(newest, other)
    capsys.readouterr()
    words = [str(run_dir), "--checkpoint", str(other)]
    said = refusal(capsys, commands.run(commands.evaluate_command, words, "evaluate.py"))
    assert said.startswith(f"{run_dir} has no checkpoint {other}: latest, best, or one of those kept, ")
    assert newest.stem in said


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = [str(run_dir), "--checkpoint", "best"]
    said = refusal(capsys, commands.run(commands.evaluate_command, words, "evaluate.py"))
    assert said == f"{run_dir} has no best checkpoint: --eval-every STEPS evaluates and keeps it while a run trains"
    words = ["--pretrained", "gravitar-ram", "--checkpoint", "best"]
    said = refusal(capsys, commands.run(commands.evaluate_command, words, "evaluate.py"))
    assert said.startswith("--checkpoint best is a run's")


def test_the_games_are_others_than_those_that_evaluate_plays(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    made = make(run_dir, 20.0)
    play_to(made, 100)
    worker: Any = made._worker
    seed = worker.orders[0]["seed"]
    assert seed not in (load_run(run_dir).seed, EvaluateArguments().seed)
    assert seed < 2**31, "the emulator's seeds have 31 bits"


@pytest.mark.parametrize("trouble", ["no candidate", "full disk"])
def test_a_best_that_cannot_be_kept_is_a_warning(
    trouble: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    made = make(run_dir, 20.0, 15.0)
    play_to(made, 100)
    with pytest.MonkeyPatch.context() as patch:
        if trouble == "no candidate":
            (checkpoint.folder(run_dir) / "candidate.pt").unlink()
        else:

            def full(name: str, path: Path) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(checkpoint, "_point_to", full)
        play_to(made, 101)
    assert "the best checkpoint could not be kept: " in caplog.text
    play_to(made, 200, 201)
    assert best_at(run_dir) == "best_000000000201", "what was not kept is no best to beat"
    made.close()
    resumed = make(run_dir, 18.0, resumed=True)  # better than the one that is there; 20 was never kept
    play_to(resumed, 300, 301)
    assert best_at(run_dir) == "best_000000000301"
    resumed.close()


def test_what_is_done_at_the_end_is_not_lost(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    made = make(run_dir, 20.0)
    play_to(made, 100)
    made.close()
    assert [row["mean"] for row in rows(run_dir / "evaluations.csv")] == [20]


class Slow(Answers):
    """One that answers when it was asked often enough."""

    asked = 0

    def answer(self, timeout: float = 0.0) -> dict[str, Any] | None:
        self.asked += 1
        return super().answer() if self.asked % 5 == 0 else None


def test_the_end_waits_for_what_is_under_way_and_for_the_last_policy(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "Worker", Slow)
    AGENT.global_step = 60
    made = make(run_dir, 20.0, 30.0)
    play_to(made, 100, 130)
    made.finish(lambda: False)
    assert [row["mean"] for row in rows(run_dir / "evaluations.csv")] == [20, 30]
    made.finish(lambda: False)  # that policy is known
    worker: Any = made._worker
    assert len(worker.orders) == 2


def test_a_policy_that_is_being_evaluated_at_the_end_is_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "Worker", Slow)
    AGENT.global_step = 60
    made = make(run_dir, 20.0)
    play_to(made, 100)
    made.finish(lambda: False)
    assert [row["mean"] for row in rows(run_dir / "evaluations.csv")] == [20]


def test_ctrl_c_leaves_the_last_evaluation_out(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "Worker", Answers)
    AGENT.global_step = 60
    made = make(run_dir)
    made.finish(lambda: True)
    worker: Any = made._worker
    assert worker.orders == []


def test_games_end_with_the_run_that_ordered_them(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(evaluator.os, "getppid", lambda: next(parents, 1))
    order = {"run_dir": str(run_dir), "checkpoint": str(checkpoint.folder(run_dir) / "latest"), "games": 500}
    with pytest.raises(Interrupted):
        evaluator._evaluate({**order, "episodes": 1, "seed": 3})


def test_a_resumed_run_may_begin_to_evaluate(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(Answers):
        def answer(self, timeout: float = 0.0) -> dict[str, Any] | None:
            self.busy = False
            return evaluator._evaluate(self.orders[-1])

    monkeypatch.setattr(evaluator, "Worker", AtOnce)
    words = ["--total-steps", 160, "--eval-every", 100, "--eval-episodes", 2]
    assert train("--resume", run_dir, *words) == 0
    assert [row["global_step"] for row in rows(run_dir / "evaluations.csv")] == [100, 160]
