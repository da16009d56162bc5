"""Evaluation: the statistics against hand-computed numbers, and games counted fairly."""

import io
import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import CARTPOLE, train

from gravitar_dqn.cli import commands
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation import scores
from gravitar_dqn.evaluation.acting import Policy, load_policy, play_games
from gravitar_dqn.evaluation.scores import bootstrap_interval, interquartile_mean, summarize, table
from gravitar_dqn.networks import QNetwork
from gravitar_dqn.presets import PRESETS
from gravitar_dqn.runtime.processes import Stop

FIELDS = "episodes epsilon sticky_actions frames_trained mean std median iqm iqm_ci95 human_normalized returns".split()


class Games:
    """A vector environment whose environment i always plays games of `lengths[i]` steps, worth 1 each step.

    Autoreset is Gymnasium's NEXT_STEP; the reset step gives a reward that no score may hold.
    """

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.num_envs, self.steps = np.array(lengths), len(lengths), 0
        self.time = np.zeros(self.num_envs, dtype=int)  # steps into the game; one more than its length: reset is due

    def reset(self, *, seed: int) -> tuple[Any, dict[str, Any]]:
        return self.time, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        resets = self.time == self.lengths
        self.time = np.where(resets, 0, self.time + 1)
        done = self.time == self.lengths
        by_time = np.arange(self.num_envs) % 2 == 1  # every other one ends by truncation
        return self.time, np.where(resets, 1000.0, 1.0), done & ~by_time, done & by_time, {}


class Watcher:
    """A policy that does nothing but note which frames it was told start a game."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.starts = num_envs, 0

    def begin(self, obs: Any) -> None:
        assert not obs.any()

    def act(self) -> torch.Tensor:
        return torch.zeros(self.num_envs, dtype=torch.int64)

    def observe(self, actions: Any, obs: Any, played: Any) -> None:
        assert ((obs == 0) == ~played).all(), "a game's first frame is not told apart"
        self.starts += int((~played).sum())


@pytest.mark.parametrize(
    ("lengths", "episodes", "expected"),
    [
        ((3,), 1, [3]),
        ((3,), 4, [3, 3, 3, 3]),
        ((1, 50), 2, [1, 50]),  # the long game counts, though 25 short ones end before it
        ((2, 40, 5), 7, [2, 2, 2, 40, 40, 5, 5]),  # 3 + 2 + 2
        ((1, 2, 3), 2, [1, 2]),
    ],
)
def test_every_environment_plays_exactly_its_share(lengths: Any, episodes: int, expected: list[float]) -> None:
    envs = Games(*lengths)
    watcher: Any = Watcher(len(lengths))
    assert play_games(envs, watcher, episodes, seed=0) == expected


def test_playing_ends_with_the_last_game_needed() -> None:
    envs = Games(5, 7)
    watcher: Any = Watcher(2)
    play_games(envs, watcher, 4, seed=0)
    assert envs.steps == 7 + 1 + 7  # two games of 7 and the reset between
    assert watcher.starts == 1 + 2  # resets of the longer games, and of the shorter


def test_interquartile_mean() -> None:
    assert interquartile_mean(np.array([8.0, 0.0, 2.0, 100.0])) == 5.0  # the middle two of 0 2 8 100
    assert interquartile_mean(np.array([7.0])) == 7.0
    assert interquartile_mean(np.array([1.0, 3.0])) == 2.0
    # 0 1 2 3 4 5: a quarter is one and a half values; half of 1, 2, 3, half of 4: (0.5 + 2 + 3 + 2) / 3
    assert interquartile_mean(np.arange(6.0)) == pytest.approx(2.5)
    # 0 0 6: a quarter is three fourths of a value; 0.25 * 0 + 1 * 0 + 0.25 * 6, over 1.5
    assert interquartile_mean(np.array([6.0, 0.0, 0.0])) == pytest.approx(1.0)


def test_interquartile_mean_of_a_hundred_games_leaves_out_a_quarter_at_each_end() -> None:
    scores = np.concatenate([np.full(25, -1e9), np.arange(50.0), np.full(25, 1e9)])
    assert interquartile_mean(np.random.default_rng(0).permutation(scores)) == pytest.approx(24.5)


def test_bootstrap_interval_holds_the_mean_and_is_the_same_twice() -> None:
    scores = np.random.default_rng(3).normal(250, 50, size=100)
    low, high = bootstrap_interval(scores, seed=7)
    assert low < interquartile_mean(scores) < high
    # The interquartile mean of normal scores has a standard error of about 1.08 * 50 / sqrt(100) = 5.4.
    assert high - low == pytest.approx(2 * 1.96 * 5.4, rel=0.35)
    assert bootstrap_interval(scores, seed=7) == (low, high)
    assert bootstrap_interval(scores, seed=8) != (low, high)
    assert bootstrap_interval(np.full(10, 4.0), seed=7) == (4.0, 4.0)


def test_summary_against_hand_computed_numbers() -> None:
    scores = [0.0, 250.0, 250.0, 1500.0]
    result = summarize(scores, PRESETS["gravitar"], epsilon=0.001, seed=1, global_step=50)
    assert list(result) == FIELDS
    low, high = result.pop("iqm_ci95")
    assert low <= 250 <= high
    assert result == {
        "episodes": 4,
        "epsilon": 0.001,
        "sticky_actions": 0.25,
        "frames_trained": 200,
        "mean": 500.0,
        # sqrt((500^2 + 250^2 + 250^2 + 1000^2) / 4)
        "std": pytest.approx(586.302, abs=1e-3),
        "median": 250.0,
        "iqm": 250.0,
        # (500 - 173) / (3351.4 - 173)
        "human_normalized": pytest.approx(0.102882, abs=1e-6),
        "returns": scores,
    }
    text = table({**result, "iqm_ci95": [low, high]})
    assert "human-normalized     10.3 %" in text
    assert "frames trained       200" in text


def test_human_normalized_is_0_for_random_and_1_for_human_play() -> None:
    for score, expected in ((173.0, 0.0), (3351.4, 1.0)):
        result = summarize([score], PRESETS["notebook"], epsilon=0, seed=1, global_step=1)
        assert result["human_normalized"] == pytest.approx(expected)


@pytest.mark.parametrize("preset", ["cartpole", "breakout"])
def test_other_games_have_no_human_normalized_score(preset: str) -> None:
    result = summarize([1.0, 2.0], PRESETS[preset], epsilon=0, seed=1, global_step=1)
    assert result["human_normalized"] is None
    assert "human" not in table(result)


def test_weights_of_another_game_are_refused() -> None:
    weights = QNetwork(4, 3).state_dict()
    with pytest.raises(UserError, match=r"^the weights do not fit CartPole-v1: .*layers.6"):
        load_policy(PRESETS["cartpole"], weights)


def test_evaluating_a_run_writes_eval_json_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    capsys.readouterr()
    words = [str(run_dir), "--episodes", "5", "--epsilon", "0.5", "--seed", "3", "--device", "cpu"]
    results = []
    for _ in range(2):
        assert commands.run(commands.evaluate_command, words, "evaluate.py") == 0
        results.append(json.loads((run_dir / "eval.json").read_text()))
    result = results[0]
    assert result == results[1], "the same seed played other games"
    assert list(result) == FIELDS
    assert (result["episodes"], result["epsilon"], result["frames_trained"]) == (5, 0.5, 100)
    assert len(result["returns"]) == 5
    assert all(score >= 8 for score in result["returns"]), "a CartPole game lasts at least 8 steps"
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert not list(run_dir.glob("*.tmp"))
    told = capsys.readouterr()
    assert "games                5" in told.out
    assert f"mean                 {result['mean']:.1f}" in told.out


@pytest.mark.parametrize(("padding", "start"), [("zero", [0, 0, 0]), ("repeat", [10, 10, 10])])
def test_the_policy_sees_the_four_newest_frames_of_its_game(padding: Any, start: list[int]) -> None:
    config = replace(PRESETS["gravitar"], agent=replace(PRESETS["gravitar"].agent, stack_padding=padding))
    policy = Policy(config, torch.nn.Linear(1, 1), EnvSpec((84, 84), torch.uint8, 18), 2, epsilon=0.0, seed=0)

    def frames(value: int) -> Any:
        return np.stack([np.full((84, 84), value, dtype=np.uint8), np.full((84, 84), 2 * value, dtype=np.uint8)])

    def seen(env: int) -> list[int]:
        return policy.frames.latest()[env, :, 0, 0].tolist()

    policy.begin(frames(10))
    assert seen(0) == [*start, 10]
    shown = [10]
    for step in range(11, 40):  # several times around the ring
        reset = step == 25
        policy.observe(torch.zeros(2, dtype=torch.int64), frames(step), np.array([not reset, True]))
        shown = [step] if reset else [*shown, step]
        first = step if reset else shown[0]
        padded = [0 if padding == "zero" else first] * 3 + shown
        assert seen(0) == padded[-4:]
        assert seen(1)[-1] == 2 * step


def evaluate(*words: object) -> int:
    return commands.run(commands.evaluate_command, [str(word) for word in words], "evaluate.py")


def test_scores_that_count_are_told_as_they_come() -> None:
    told: list[float] = []
    watcher: Any = Watcher(3)
    scores = play_games(Games(2, 40, 5), watcher, 7, seed=0, on_score=told.append)
    assert sorted(told) == sorted(scores), "a game beyond an environment's share was told too"
    assert told[0] == 2


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also before a game has ended: an idle agent's end all together, after minutes."""
    now = [100.0]
    monkeypatch.setattr(scores.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "gravitar_dqn")
    progress = scores.Progress(3)
    for seconds, games in ((10, []), (21, []), (10, [100]), (10, [300]), (11, [])):
        for score in games:
            progress.add(score)
        now[0] += seconds
        progress.step()
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "0 of 3 games, 2 steps in each environment",
        "2 of 3 games, mean score 200.0, 5 steps in each environment",
    ]


def test_progress_at_a_terminal_moves_before_a_game_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, now = io.StringIO(), [100.0]
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(scores.time, "monotonic", lambda: now[0])
    progress = scores.Progress(3)
    now[0] += 2
    progress.step()
    assert "1 steps in each environment" in terminal.getvalue()
    progress.close()


def test_ctrl_c_keeps_the_games_that_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    assert evaluate(run_dir, "--episodes", 3) == 0
    before = (run_dir / "eval.json").read_bytes()
    played = scores.play_games

    def interrupted(*args: Any, **kwargs: Any) -> list[float]:
        def raise_signal(score: float) -> None:
            signal.raise_signal(signal.SIGINT)

        return played(*args[:6], raise_signal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "play_games", interrupted)
        assert evaluate(run_dir, "--episodes", 40) == 130
    partial = json.loads((run_dir / "eval_partial.json").read_text())
    assert 1 <= partial["episodes"] == len(partial["returns"]) < 40
    assert (run_dir / "eval.json").read_bytes() == before, "an evaluation of all games was lost"
    told = capsys.readouterr()
    assert f"stopped after {partial['episodes']} of 40 games: long games are missing" in told.err
    assert "eval_partial.json" in told.out


def test_ctrl_c_before_a_game_has_ended_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "play_games", lambda *args: [])
        patch.setattr(Stop, "exit_code", 130)
        assert evaluate(run_dir) == 130
    assert "stopped before a game had ended" in capsys.readouterr().err
    assert not list(run_dir.glob("eval*.json"))


def test_games_are_cut_off_after_the_steps_asked_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    assert evaluate(run_dir, "--episodes", 4, "--max-steps", 5) == 0
    assert not (run_dir / "eval.json").exists(), "they are no whole games"
    result = json.loads((run_dir / "eval_cut.json").read_text())
    assert result["returns"] == [5.0] * 4
    assert result["max_steps"] == 5


def test_what_was_played_is_shown_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(*CARTPOLE, "--total-steps", 100, "--run-dir", run_dir) == 0
    (run_dir / "eval.json").mkdir()
    assert evaluate(run_dir, "--episodes", 2) == 2
    told = capsys.readouterr()
    assert "games                2" in told.out
    assert "error: " in told.err
