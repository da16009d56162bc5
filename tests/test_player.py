"""`load_agent`: actions for observations as Gymnasium shows them, the same that evaluation would take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from run_helpers import CARTPOLE, GRAVITAR, RANDAL_CARTPOLE, ROOT, train

import gravitar_dqn
from gravitar_dqn import load_agent
from gravitar_dqn.envs import make_envs, spec_of
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation.acting import Policy, load_policy
from gravitar_dqn.evaluation.trained_agent import from_pretrained, names


@pytest.fixture
def in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs in runs/."""
    monkeypatch.chdir(tmp_path)
    assert train(*CARTPOLE, "--total-steps", 200, "--run-dir", "runs/dqn") == 0
    assert train(*RANDAL_CARTPOLE, "--total-steps", 60, "--run-dir", "runs/randal") == 0
    return tmp_path


def test_a_run_is_loaded_by_its_folder_or_its_name(in_runs: Path) -> None:
    by_folder, by_name = load_agent("runs/dqn", device="cpu"), load_agent("dqn", device="cpu")
    assert load_agent(in_runs / "runs" / "dqn").name == by_folder.name == by_name.name == "dqn"
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    actions = by_folder.predict(obs)
    assert isinstance(actions, np.ndarray)
    assert actions.dtype == np.int64 and actions.shape == (20,)
    assert (actions == by_name.predict(obs)).all()
    one = by_folder.predict(obs[3])
    assert type(one) is int and one == actions[3]
    assert by_folder.predict(obs[3].tolist()) == one


def test_what_is_no_agent_is_named(in_runs: Path) -> None:
    with pytest.raises(UserError, match=r"^nothing is no run: .*; weights ship for gravitar-ram"):
        load_agent("nothing")
    with pytest.raises(UserError, match="has no best checkpoint: --eval-every"):
        load_agent("dqn", checkpoint="best")
    with pytest.raises(UserError, match="dqn has no checkpoint bset: latest, best, or one of those kept, step_0"):
        load_agent("dqn", checkpoint="bset")
    with pytest.raises(UserError, match="gravitar-ram ships with the package"):
        load_agent("gravitar-ram", checkpoint="best")
    with pytest.raises(ValueError, match=re.escape("an observation has the shape (4,), not (5,): see make_env")):
        load_agent("dqn").predict(np.zeros(5))


def test_epsilon_and_the_policys_draws_are_seeded(in_runs: Path) -> None:
    obs = np.zeros((300, 4), dtype=np.float32)
    dqn = load_agent("dqn", seed=1)
    assert len(np.unique(dqn.predict(obs))) == 1, "greedy"
    assert 60 < np.sum(dqn.predict(obs, epsilon=1.0)) < 240
    first, again, other = (load_agent("randal", seed=seed).predict(obs) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any() and len(np.unique(first)) == 2, "PPO's actions are drawn"


@pytest.mark.parametrize("name", names())
def test_it_acts_as_evaluation_does(name: str) -> None:
    """The stack that `make_env` shows is the one that the ring makes, step by step, over a reset too."""
    agent, trained = load_agent(name, device="cpu"), from_pretrained(name)
    env = agent.make_env()
    seen: list[torch.Tensor] = []
    single = make_envs(replace(trained.config.env, num_envs=1))
    network = load_policy(trained.config, trained.weights)
    policy = Policy(
        trained.config, network, spec_of(single), 1, epsilon=0.0, seed=0, on_act=lambda o, a: seen.append(o)
    )
    single.close()
    for start in range(2):
        obs, _ = env.reset(seed=7 + start)
        newest = np.asarray(obs)[-1]
        if start == 0:
            policy.begin(newest[None])
        else:
            policy.observe(torch.zeros(1, dtype=torch.int64), newest[None], np.array([False]))
        for _ in range(30):
            action = agent.predict(obs)
            assert int(policy.act()) == action
            assert (seen[-1][0].numpy() == np.asarray(obs)).all()
            obs, *_ = env.step(action)
            policy.observe(torch.tensor([action]), np.asarray(obs)[-1][None], np.array([True]))
    env.close()


def test_make_env_shows_pictures_as_a_policy_of_pictures_sees_them(in_runs: Path) -> None:
    assert train(*GRAVITAR, "--total-steps", 8, "--run-dir", "runs/pictures") == 0
    agent = load_agent("pictures", device="cpu")
    env = agent.make_env()
    obs, _ = env.reset(seed=1)
    assert np.asarray(obs).shape == agent.obs_shape == (4, 84, 84) and obs.dtype == np.uint8
    assert not np.asarray(obs)[:3].any(), "before a game's first picture there is nothing"
    assert isinstance(env.action_space, gym.spaces.Discrete)
    assert 0 <= int(agent.predict(obs)) < env.action_space.n
    env.close()


def test_the_example_of_the_readme_plays_a_game(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?load_agent.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    make_env = gravitar_dqn.Player.make_env

    def short(self: Any, **options: Any) -> Any:
        return gym.wrappers.TimeLimit(make_env(self, **options), 40)

    monkeypatch.setattr(gravitar_dqn.Player, "make_env", short)
    exec(compile(example, "README.md", "exec"), {})
    assert re.match(r"^\d+(\.\d+)?\n$", capsys.readouterr().out)


def test_games_begin_as_in_training() -> None:
    """Up to 30 emulator frames of no-ops, in steps of 4, before the agent plays."""
    env = load_agent("gravitar-ram", device="cpu").make_env()
    begun = set()
    for seed in range(40):
        env.reset(seed=seed)
        begun.add(env.unwrapped.ale.getEpisodeFrameNumber())  # type: ignore[attr-defined]
    assert begun == {4 * steps for steps in range(8)}
    env.close()
