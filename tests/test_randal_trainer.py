"""`RANDAL` and `RANDALTrainer`: the published names, from Python, over the package's own loop and files."""

import json
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from run_helpers import rows

import gravitar_dqn
from gravitar_dqn import GAE, MLP, RANDAL, NatureCNN, PPOConfig, PredictorCNN, PredictorMLP, RANDALTrainer
from gravitar_dqn import RANDALTrainerConfig as TrainerConfig
from gravitar_dqn.config import EnvSettings
from gravitar_dqn.envs import config_of, make_envs
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation.acting import play_games
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.folder import load_run
from gravitar_dqn.runtime.clock import Every
from gravitar_dqn.runtime.processes import Stop


def vector_agent(**options: Any) -> RANDAL:
    torch.manual_seed(0)
    ppo = PPOConfig(lr=3e-3, lr_final=1e-3, decay_steps=1_000, device="cpu", policy_clip=0.2)
    return RANDAL(MLP, PredictorMLP, (1,), 2, ppo, pixel_control=False, **options)


def saved_agent(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = checkpoint.load(run_dir)["agent"]
    return state


def config(home: Path, **changes: Any) -> TrainerConfig:
    options: dict[str, Any] = {
        "total_steps": 700,
        "nsteps": 8,
        "num_epochs": 2,
        "num_minibatches": 2,
        "init_obs_steps": 30,
        "replay_length": 100,
        "log_dir": str(home / "logs"),
        "model_dir": str(home / "models"),
        "log_scalars": False,
        "validate_freq": 300,
        "num_val_episodes": 6,
    }
    return TrainerConfig(**{**options, **changes})


def test_the_published_names_can_be_imported() -> None:
    for name in (
        "RANDAL PPOConfig PredictorCNN PredictorMLP RANDALTrainer RANDALTrainerConfig RunningMeanStd "
        "RewardForwardFilter"
    ).split():
        assert getattr(gravitar_dqn, name).__name__ == name
        assert name in dir(gravitar_dqn)
    assert gravitar_dqn.PPOIntrinsic is ActorCritic and "PPOIntrinsic" in dir(gravitar_dqn)
    with pytest.raises(AttributeError, match="Randal"):
        _ = gravitar_dqn.Randal


def test_the_predictors_loss_and_pixel_range_by_their_public_names() -> None:
    torch.manual_seed(0)
    agent = RANDAL(NatureCNN, PredictorCNN, (4, 84, 84), 6, PPOConfig(device="cpu"), intr_coeff=1.0)
    frames = torch.randint(10, 200, (8, 1, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(agent.norm_obs(frames), frames.float() / 255)  # nothing was seen yet
    agent.pixel_range.copy_(torch.tensor([10.0, 199.0]))  # as training does
    torch.testing.assert_close(agent.norm_obs(frames), (frames.float() - 10) / 189)
    mean, std = frames.float().mean(dim=0), torch.full((1, 84, 84), 50.0)
    z = ((frames.float() - mean) / std).clamp(-5, 5)
    with torch.no_grad():
        target, predictor = agent.networks.rnd
        expected = (predictor(z) - target(z)).square().mean()
    torch.testing.assert_close(agent.predictor_loss(frames, mean, std), expected)
    q_values, targets = torch.randn(3, 6, 21, 21), torch.randn(3, 21, 21)
    chosen = torch.stack([q_values[0, 5], q_values[1, 0], q_values[2, 2]])
    torch.testing.assert_close(
        agent.pixel_loss(q_values, torch.tensor([5, 0, 2]), targets), 0.5 * (chosen - targets).square().mean()
    )


def test_the_published_defaults() -> None:
    made = TrainerConfig()
    assert (made.train_mode, made.returns, made.total_steps, made.nsteps) == ("nstep", "nstep", 50_000_000, 5)
    assert (made.gamma, made.lambda_, made.gamma_intr, made.init_obs_steps) == (0.99, 0.95, 0.99, 600)
    assert (made.validate_freq, made.num_val_episodes, made.max_val_steps) == (1_000_000, 50, 10_000)
    assert (made.log_dir, made.model_dir, made.save_freq, made.log_scalars) == ("logs/", "models/", 0, True)
    assert (made.update_target_freq, made.render_freq, made.num_epochs, made.num_minibatches) == (0, 0, 4, 4)
    assert (made.replay_length, made.norm_pixel_reward) == (2000, True)
    ppo = PPOConfig()
    assert (ppo.grad_clip, ppo.entropy_coeff, ppo.policy_clip) == (0.5, 0.01, 0.1)
    agent = vector_agent()
    assert (agent.intr_coeff, agent.extr_coeff) == (0.5, 1.0)
    assert agent.weights == {"pixel_control": 0.0, "reward_prediction": 1.0, "value_replay": 1.0}


def test_it_trains_validates_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = vector_agent()
    envs, val_envs = probes.vector_of(probes.Both, 4), probes.vector_of(probes.Both, 3)
    trainer = RANDALTrainer(envs, agent, val_envs, config(tmp_path, save_freq=300))
    trainer.train()
    told = capsys.readouterr()
    assert "episode: 0, score: " in told.out and "done: 70" in told.err
    saved = load_run(trainer.run_dir)
    assert saved == trainer.run_config
    assert saved.agent.learning_rate == 3e-3 and saved.agent.num_steps == 8 and saved.rnd.coef == 0.5
    validations = rows(trainer.run_dir / "validation.csv")
    assert [row["global_step"] // 300 for row in validations] == [1, 2]
    assert "validation at step" in told.err
    kept = sorted((tmp_path / "models" / trainer.run_dir.name).iterdir())
    assert len(kept) == 2
    learned = saved_agent(trainer.run_dir)["policy"]
    assert all(torch.equal(value, learned[name]) for name, value in agent.policy.state_dict().items()), "trained itself"
    agent.policy.load_state_dict(torch.load(kept[-1], weights_only=True))
    record = json.loads((trainer.run_dir / "config.json").read_text())
    assert record["preset"] == "randal"


def test_pictures_and_the_lambda_return(tmp_path: Path) -> None:
    torch.manual_seed(0)
    agent = RANDAL(NatureCNN, PredictorCNN, (4, 84, 84), 18, PPOConfig(device="cpu"), intr_coeff=1.0, extr_coeff=2.0)
    envs = make_envs(EnvSettings(num_envs=2))
    settings = config(tmp_path, total_steps=90, nsteps=8, returns=GAE, num_epochs=1, init_obs_steps=3)
    trainer = RANDALTrainer(envs, agent, None, settings)
    trainer.train()
    assert trainer.run_config.env.id == "ALE/Gravitar-v5"
    state = saved_agent(trainer.run_dir)
    assert state["clocks"]["num_updates"] > 0
    assert torch.equal(agent.pixel_range, state["tasks"]["pixel_range"]) and agent.pixel_range[0] < agent.pixel_range[1]
    told = [row["pixel_control_loss"] for row in rows(trainer.run_dir / "metrics.csv")]
    assert np.isfinite(told).any(), "a row that fell between two updates has none"
    names = {path.name for path in trainer.run_dir.iterdir()}
    assert names == {"config.json", "metrics.csv", "episodes.csv", "checkpoints", "lock"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_mode": "onestep"}, "only NSTEP"),
        ({"returns": "td"}, "NSTEP or GAE"),
        ({"update_target_freq": 100}, "no target network"),
        ({"save_freq": -1}, "save_freq is -1"),
        ({"num_val_episodes": 0}, "num_val_episodes is 0"),
        ({"num_minibatches": 5}, "^num_minibatches is 5: it must divide the 32 steps of a rollout"),
        ({"gamma": 1.5}, "^gamma is 1.5"),
        ({"nsteps": 16.0}, "^nsteps is 16.0: it must be int"),
        ({"init_obs_steps": 0}, "^init_obs_steps is 0: it must be finite and at least 1"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        RANDALTrainer(probes.vector_of(probes.Both, 4), vector_agent(), None, config(tmp_path, **changes))


def test_a_run_goes_on_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trainer(**changes: Any) -> RANDALTrainer:
        return RANDALTrainer(probes.vector_of(probes.Both, 4), vector_agent(), None, config(tmp_path, **changes))

    first = trainer(total_steps=300)
    first.train()
    before = saved_agent(first.run_dir)["clocks"]
    again = trainer()
    again.run_dir = first.run_dir
    with pytest.raises(UserError, match=r"exists: train\(resume=...\) goes on with it"):
        again.train()
    with pytest.raises(UserError, match="other settings, it cannot go on: seed: 742 -> 3"):
        trainer(seed=3).train(resume=first.run_dir)
    second = trainer(total_steps=500)
    second.train(resume=first.run_dir)
    after = saved_agent(first.run_dir)["clocks"]
    assert after["global_step"] >= 500 and after["num_updates"] > before["num_updates"]
    steps = [row["global_step"] for row in rows(first.run_dir / "episodes.csv")]
    assert [Every(5, now).due(9) for now in (0, 4, 6)] == [True, True, False]  # multiples, wherever a session began
    assert steps == sorted(steps) and steps[0] < 300 < steps[-1]
    assert f"going on with {first.run_dir}" in capsys.readouterr().err


def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = RANDALTrainer(probes.vector_of(probes.Both, 4), vector_agent(), None, config(tmp_path))
    monkeypatch.setattr(Stop, "__init__", lambda self: setattr(self, "_number", signal.SIGINT))
    trainer.train()
    assert f"go on with: RANDALTrainer(...).train(resume='{trainer.run_dir}')" in capsys.readouterr().err


@pytest.mark.parametrize("stack", [1, 3])
def test_stacks_that_the_replay_buffer_does_not_make_are_refused(tmp_path: Path, stack: int) -> None:
    agent = RANDAL(NatureCNN, PredictorCNN, (stack, 84, 84), 2, PPOConfig(device="cpu"), PC=0)
    envs = probes.vector_of(probes.Remember, 2)
    with pytest.raises(UserError, match=rf"the agent's input_size is \({stack}, 84, 84\)"):
        RANDALTrainer(envs, agent, None, config(tmp_path))


def test_environments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    envs = probes.vector_of(probes.Both, 2)
    with pytest.raises(UserError, match="make others for validation"):
        RANDALTrainer(envs, vector_agent(), envs, config(tmp_path))
    same_step = SyncVectorEnv([probes.Both] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(UserError, match=r"it must be AutoresetMode\.NEXT_STEP"):
        RANDALTrainer(same_step, vector_agent(), None, config(tmp_path))
    cartpole = make_envs(EnvSettings(id="CartPole-v1", num_envs=2))
    with pytest.raises(UserError, match=r"observations \(4,\), but the agent's input_size is \(1,\)"):
        RANDALTrainer(cartpole, vector_agent(), None, config(tmp_path))
    three = RANDAL(MLP, PredictorMLP, (4,), 3, PPOConfig(device="cpu"), PC=0)
    with pytest.raises(UserError, match="have 2 actions, the agent 3"):
        RANDALTrainer(cartpole, three, None, config(tmp_path))


def test_the_runs_settings_say_what_was_played(tmp_path: Path) -> None:
    made = EnvSettings(id="CartPole-v1", num_envs=4, num_threads=3)
    agent = RANDAL(MLP, PredictorMLP, (4,), 2, PPOConfig(device="cpu"), PC=0, optim=torch.optim.RMSprop)
    run = RANDALTrainer(make_envs(made), agent, None, config(tmp_path, seed=5)).run_config
    assert run.env == made and run.agent.optimizer == "rmsprop" and run.seed == 5
    assert config_of(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")).id == "CartPole-v1"
    assert config_of(probes.vector_of(probes.Both, 3)) == EnvSettings(id="SyncVectorEnv", num_envs=3)


class Endless(probes.Probe):
    """Earns 1 a step; every third game ends after four steps, the others after thirty."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.games = getattr(self, "games", 0) + 1
        return super().reset(seed=seed, options=options)

    @property
    def length(self) -> int:  # type: ignore[override]
        return 4 if self.games % 3 == 1 else 30


def test_a_long_game_counts_with_what_it_has_by_then() -> None:
    class First:
        def begin(self, obs: Any) -> None:
            pass

        def act(self) -> torch.Tensor:
            return torch.zeros(1, dtype=torch.int64)

        def observe(self, *anything: Any) -> None:
            pass

    policy: Any = First()
    for_ever = type("ForEver", (probes.Probe,), {"length": 0})
    assert play_games(probes.vector_of(for_ever, 1), policy, 3, 0, max_steps=10) == [10.0, 10.0, 10.0]
    assert play_games(probes.vector_of(Endless, 1), policy, 4, 0, max_steps=10) == [4.0, 10.0, 10.0, 4.0]
    assert play_games(probes.vector_of(Endless, 1), policy, 4, 0, max_steps=4) == [4.0] * 4
    assert play_games(probes.vector_of(Endless, 1), policy, 3, 0) == [4.0, 30.0, 30.0]
