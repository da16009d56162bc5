"""`RANDALTrainer`: the published way to train RANDAL from Python, over the same loop as everything else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gravitar_dqn import envs as games
from gravitar_dqn import training
from gravitar_dqn.config import EnvConfig, PPOAgentConfig, PPORNDConfig, RANDALConfig, TasksConfig, UserError, validate
from gravitar_dqn.evaluation import Policy, play_games
from gravitar_dqn.execution import keep_freed_memory
from gravitar_dqn.randal.agent import RANDAL
from gravitar_dqn.tracking import CsvLog, Episode, Observer, tell

NSTEP, GAE = "nstep", "gae"


@dataclass(frozen=True)
class RANDALTrainerConfig:
    """A training run. Steps are agent steps over all environments, but for nsteps and init_obs_steps."""

    train_mode: str = NSTEP
    """Rollouts of nsteps; there is no other."""
    returns: str = NSTEP
    """What value replay learns: NSTEP, or GAE's lambda-returns."""
    total_steps: int = 50_000_000
    """The run ends after this many steps."""
    nsteps: int = 5
    """Steps of every environment in a rollout."""
    gamma: float = 0.99
    """Discount per step of the score."""
    lambda_: float = 0.95
    """Generalized advantage estimation's lambda."""
    validate_freq: int = 1_000_000
    """Steps from one validation to the next; 0: none."""
    num_val_episodes: int = 50
    """Games of a validation."""
    max_val_steps: int = 10_000
    """A game of a validation is cut off after this many steps."""
    log_dir: str = "logs/"
    """The run's folder is made here."""
    model_dir: str = "models/"
    """Copies of the policy's weights go here, to a folder of the run's name."""
    save_freq: int = 0
    """Steps from one such copy to the next; 0: none. Checkpoints to resume from are in the run's folder anyway."""
    log_scalars: bool = True
    """Write metrics.csv and draw it on the dashboard."""
    update_target_freq: int = 0
    """PPO has no target network: only 0 fits."""
    render_freq: int = 0
    """Games from one that is filmed to the next; 0: none."""
    gamma_intr: float = 0.99
    """Discount per step of the bonus."""
    init_obs_steps: int = 600
    """Random steps of every environment that start the observation statistics."""
    num_epochs: int = 4
    """Passes over a rollout."""
    num_minibatches: int = 4
    """Gradient steps in a pass."""
    replay_length: int = 2000
    """Steps of every environment that the replay keeps."""
    norm_pixel_reward: bool = True
    """Measure pixel changes between the darkest and brightest pixel seen instead of 0 and 255."""


class Every:
    """Says when a period of so many steps has passed; a period of 0 never does."""

    def __init__(self, period: int, now: int) -> None:
        self._period, self._next = period, now + period

    def due(self, now: int) -> bool:
        """Whether to act now."""
        if self._period == 0 or now < self._next:
            return False
        self._next = (now // self._period + 1) * self._period
        return True


class Validator:
    """Plays whole games with the present policy and notes their scores in validation.csv. Training waits for it."""

    def __init__(self, config: RANDALTrainerConfig, run: RANDALConfig, agent: RANDAL, envs: Any, path: Path) -> None:
        self._config, self._run, self._agent, self._envs = config, run, agent, envs
        self._every = Every(config.validate_freq, agent.global_step)
        self._log = CsvLog(path, ["global_step", "mean", "std", "min", "max"], agent.global_step or None)

    def step(self, episodes: list[Episode]) -> None:
        """Validate when it is time."""
        if self._every.due(self._agent.global_step):
            self.validate()

    def validate(self) -> float:
        """The mean score of `num_val_episodes` games."""
        agent, config = self._agent, self._config
        frame = games.frame_of(self._envs)
        seed = self._run.seed + agent.global_step
        policy = Policy(self._run, agent.policy, frame, self._envs.num_envs, epsilon=0.0, seed=seed)
        scores = np.array(play_games(self._envs, policy, config.num_val_episodes, seed, config.max_val_steps))
        told = [f"{value:g}" for value in (scores.mean(), scores.std(), scores.min(), scores.max())]
        self._log.add([agent.global_step, *told])
        self._log.flush()
        tell(f"validation at step {agent.global_step}: mean score {told[0]} of {len(scores)} games")
        return float(scores.mean())

    def close(self) -> None:
        """Nothing waits."""


class Saver:
    """Copies the policy's weights to a folder every so many steps."""

    def __init__(self, period: int, agent: RANDAL, home: Path) -> None:
        self._every, self._agent, self._home = Every(period, agent.global_step), agent, home

    def step(self, episodes: list[Episode]) -> None:
        """Save when it is time; a full disk costs a line, not the run."""
        if self._every.due(self._agent.global_step):
            path = self._home / f"step_{self._agent.global_step:012d}.pt"
            try:
                self._home.mkdir(parents=True, exist_ok=True)
                torch.save(self._agent.policy_state(), path)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                path.unlink(missing_ok=True)
                tell(f"warning: {path} not written: {error}")

    def close(self) -> None:
        """Nothing waits."""


class RANDALTrainer:
    """Trains an agent in environments that are given.

    Args:
        envs: a Gymnasium vector environment with NEXT_STEP autoreset, such as `gravitar_dqn.envs.make_envs` gives.
        agent: a `RANDAL` that fits it.
        val_envs: another one, for validations; None: there are none.
        config: the run.
    """

    def __init__(self, envs: Any, agent: RANDAL, val_envs: Any, config: RANDALTrainerConfig) -> None:
        check(config)
        self.config, self.envs, self.agent, self.val_envs = config, envs, agent, val_envs
        self.run_config = run_config(envs, agent, config)
        validate(self.run_config)
        name = f"{self.run_config.env.id.replace('/', '-')}__randal__{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(config.log_dir) / name

    def train(self) -> None:
        """Train until `total_steps` or Ctrl-C, and save to the run's folder."""
        config, run, agent = self.config, self.run_config, self.agent
        keep_freed_memory()
        training.check_execution(run, agent.device)
        agent.attach(run, *games.frame_of(self.envs))
        further: list[Observer] = []
        if config.save_freq:
            further.append(Saver(config.save_freq, agent, Path(config.model_dir) / self.run_dir.name))
        if self.val_envs is not None and config.validate_freq:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            further.append(Validator(config, run, agent, self.val_envs, self.run_dir / "validation.csv"))
        training.run(run, self.run_dir, self.envs, agent, {}, further=further)


def check(config: RANDALTrainerConfig) -> None:
    """Raise UserError for the first setting that cannot work."""
    if config.train_mode != NSTEP:
        raise UserError(f"train_mode is {config.train_mode!r}: only NSTEP fits PPO")
    if config.returns not in (NSTEP, GAE):
        raise UserError(f"returns is {config.returns!r}: NSTEP or GAE")
    if config.update_target_freq:
        raise UserError(f"update_target_freq is {config.update_target_freq}: PPO has no target network, only 0 fits")
    for name in ("validate_freq", "save_freq", "render_freq"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} is {getattr(config, name)}: it must be at least 0")
    for name in ("num_val_episodes", "max_val_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: it must be at least 1")


def run_config(envs: Any, agent: RANDAL, config: RANDALTrainerConfig) -> RANDALConfig:
    """The run's settings as every run has them, in config.json."""
    spec = getattr(envs, "spec", None)
    weights = agent.tasks.weights
    return RANDALConfig(
        env=EnvConfig(id=spec.id if spec is not None else type(envs).__name__, num_envs=envs.num_envs),
        agent=PPOAgentConfig(
            num_steps=config.nsteps,
            update_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            learning_rate=agent.ppo.lr,
            learning_rate_end=agent.ppo.lr_final,
            learning_rate_decay=agent.ppo.decay_steps,
            max_grad_norm=agent.ppo.grad_clip,
            gamma=config.gamma,
            gae_lambda=config.lambda_,
            clip_coef=agent.ppo.policy_clip,
            ent_coef=agent.ppo.entropy_coeff,
            ext_coef=agent.extr_coeff,
        ),
        rnd=PPORNDConfig(coef=agent.intr_coeff, gamma=config.gamma_intr, init_steps=config.init_obs_steps),
        tasks=TasksConfig(
            pixel_control=weights["pixel_control"],
            reward_prediction=weights["reward_prediction"],
            value_replay=weights["value_replay"],
            replay_length=config.replay_length,
            scale_pixels=config.norm_pixel_reward,
            returns="gae" if config.returns == GAE else "nstep",
        ),
        total_steps=config.total_steps,
        device=agent.ppo.device,
        dashboard="auto" if config.log_scalars else "off",
        log_seconds=2.0 if config.log_scalars else 1e9,
        video_every=config.render_freq,
    )
