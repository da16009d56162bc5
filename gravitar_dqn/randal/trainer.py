"""`RANDALTrainer`: the published way to train RANDAL from Python, over the same loop as everything else."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from gravitar_dqn import training
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.config import PPORNDSettings, PPORunConfig, bounded, build, check_bounds, differences, nest, validate
from gravitar_dqn.envs import config_of, spec_of
from gravitar_dqn.errors import NotFinite, SettingError, UserError
from gravitar_dqn.evaluation.acting import Policy, play_games
from gravitar_dqn.loop import Episode, Observer
from gravitar_dqn.presets import PUBLISHED_PPO
from gravitar_dqn.randal.interface import RANDAL
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.csv_log import CsvLog
from gravitar_dqn.run.files import written_whole
from gravitar_dqn.run.folder import load_run, lock
from gravitar_dqn.run.logs import show_log
from gravitar_dqn.runtime.clock import Every
from gravitar_dqn.runtime.execution import enough_memory, keep_freed_memory
from gravitar_dqn.runtime.processes import Stop

log = logging.getLogger(__name__)

NSTEP, GAE = "nstep", "gae"


@dataclass(frozen=True)
class RANDALTrainerConfig:
    """A training run. Steps are agent steps over all environments, unless a setting says otherwise."""

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
    validate_freq: int = bounded(1_000_000)
    """Steps from one validation to the next; 0: none."""
    num_val_episodes: int = bounded(50, low=1)
    """Games of a validation."""
    max_val_steps: int = bounded(10_000, low=1)
    """A game of a validation is cut off after this many of its own steps."""
    log_dir: str = "logs/"
    """The run's folder is made here."""
    model_dir: str = "models/"
    """Copies of the policy's weights go here, to a folder of the run's name."""
    save_freq: int = bounded(0)
    """Steps from one such copy to the next; 0: none. Checkpoints to resume from are in the run's folder anyway."""
    log_scalars: bool = True
    """Draw metrics.csv, which is written anyway, on the dashboard."""
    update_target_freq: int = 0
    """PPO has no target network: only 0 fits."""
    render_freq: int = bounded(0)
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
    seed: int = 742
    """Seeds the games, sampling and the policy's choices. (The networks were made before: `torch.manual_seed`.)"""


class Validator:
    """Plays whole games with the present policy and notes their scores in validation.csv. Training waits for it."""

    def __init__(
        self, config: RANDALTrainerConfig, run: PPORunConfig, agent: PPOAgent, envs: Any, path: Path, stop: Stop
    ) -> None:
        self._config, self._run, self._agent, self._envs, self._stop = config, run, agent, envs, stop
        self._every = Every(config.validate_freq, agent.global_step)
        self._log = CsvLog(path, ["global_step", "mean", "std", "min", "max"], agent.global_step or None)

    def step(self, episodes: list[Episode]) -> None:
        """Validate when it is time."""
        if self._every.due(self._agent.global_step):
            self.validate()

    def validate(self) -> None:
        """Play `num_val_episodes` games; a signal breaks that off, and nothing is noted."""
        agent, config = self._agent, self._config
        spec = spec_of(self._envs)
        seed = self._run.seed + agent.global_step
        policy = Policy(self._run, agent.policy, spec, self._envs.num_envs, epsilon=0.0, seed=seed)
        games = config.num_val_episodes, seed, config.max_val_steps
        scores = np.array(play_games(self._envs, policy, *games, interrupted=lambda: self._stop.requested))
        if self._stop.requested:
            return
        text = [f"{value:g}" for value in (scores.mean(), scores.std(), scores.min(), scores.max())]
        self._log.add([agent.global_step, *text])
        self._log.flush()
        log.info("validation at step %d: mean score %s of %d games", agent.global_step, text[0], len(scores))


class Saver:
    """Copies the policy's weights to a folder every so many steps."""

    def __init__(self, period: int, agent: PPOAgent, home: Path) -> None:
        self._every, self._agent, self._home = Every(period, agent.global_step), agent, home

    def step(self, episodes: list[Episode]) -> None:
        """Save when it is time, but never NaN (NotFinite); a full disk costs a line, not the run."""
        if self._every.due(self._agent.global_step):
            weights = self._agent.policy_state()
            if name := checkpoint.not_finite(weights):
                raise NotFinite(f"{name} holds NaN or infinity")
            path = self._home / f"step_{self._agent.global_step:012d}.pt"
            try:
                self._home.mkdir(parents=True, exist_ok=True)
                with written_whole(path) as temporary:
                    torch.save(weights, temporary)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                log.warning("%s not written: %s", path, error)


class RANDALTrainer:
    """Trains an agent in environments that are given, and closes them.

    Args:
        envs: a Gymnasium vector environment with NEXT_STEP autoreset, such as `gravitar_dqn.envs.make_envs` returns.
        agent: a `RANDAL` that fits it.
        val_envs: another one, for validations; None: there are none.
        config: the run.
    """

    def __init__(self, envs: Any, agent: RANDAL, val_envs: Any, config: RANDALTrainerConfig) -> None:
        check(config)
        check_fit(envs, agent)
        if val_envs is not None:
            check_fit(val_envs, agent)
            if val_envs is envs:
                raise UserError("val_envs are the environments that are trained in: make others for validation")
        self.config, self.envs, self.agent, self.val_envs = config, envs, agent, val_envs
        try:
            self.run_config = run_config(envs, agent, config)
            validate(self.run_config)
        except SettingError as error:
            raise UserError(f"{PUBLISHED.get(error.name, error.name)} {error.complaint}") from None
        name = f"{self.run_config.env.id.replace('/', '-')}__randal__{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(config.log_dir) / name

    def train(self, resume: Path | str | None = None) -> None:
        """Train until `total_steps` or Ctrl-C, and save to the run's folder, `run_dir`.

        `resume` is the folder of a run to go on with; its agent and settings must have been made as these were.
        """
        show_log()
        run = self.run_config
        if resume is not None:
            self.run_dir = Path(resume)
            if changed := differences(load_run(self.run_dir, to_train=True), run):
                text = [f"{PUBLISHED.get(name, name)}: {old} -> {new}" for name, (old, new) in changed.items()]
                raise UserError(f"{resume} was started with other settings, it cannot go on: {'; '.join(text)}")
        elif self.run_dir.exists():
            raise UserError(f"{self.run_dir} exists: train(resume=...) goes on with it")
        keep_freed_memory()
        with lock(self.run_dir), contextlib.ExitStack() as closing:
            for envs in filter(None, (self.envs, self.val_envs)):
                closing.callback(envs.close)
            self._train(resume=resume is not None)

    def _train(self, resume: bool) -> None:
        config, run, stop, damaged = self.config, self.run_config, Stop(), list[checkpoint.NotWhole]()
        state = checkpoint.load(self.run_dir, damaged=damaged) if resume else {}
        with enough_memory():
            spec, device = spec_of(self.envs), self.agent.device
            agent = PPOAgent(run, spec, device, self.agent.networks, self.agent.make_optimizer)
            agent.tasks.pixel_range = self.agent.pixel_range
        if resume:
            training.restore(agent, state, self.run_dir)
        checkpoint.set_aside(self.run_dir, damaged)

        def further() -> Iterator[Observer]:
            if config.save_freq:
                yield Saver(config.save_freq, agent, Path(config.model_dir) / self.run_dir.name)
            if config.validate_freq and self.val_envs is not None:
                yield Validator(config, run, agent, self.val_envs, self.run_dir / "validation.csv", stop)

        how = f"RANDALTrainer(...).train(resume={str(self.run_dir)!r})"
        training.run(run, self.run_dir, self.envs, agent, state, further=further, how_to_resume=how, stop=stop)


def check(config: RANDALTrainerConfig) -> None:
    """Raise UserError for the first setting that cannot work."""
    if config.train_mode != NSTEP:
        raise UserError(f"train_mode is {config.train_mode!r}: only NSTEP fits PPO")
    if config.returns not in (NSTEP, GAE):
        raise UserError(f"returns is {config.returns!r}: NSTEP or GAE")
    if config.update_target_freq:
        raise UserError(f"update_target_freq is {config.update_target_freq}: PPO has no target network, only 0 fits")
    check_bounds(config)


def check_fit(envs: Any, agent: RANDAL) -> None:
    """Raise UserError for environments that the agent cannot play."""
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise UserError(f"the environments' autoreset mode is {mode}: it must be AutoresetMode.NEXT_STEP")
    spec = spec_of(envs)
    if spec.obs_shape != agent.input_size:
        raise UserError(
            f"the environments show {spec.frame_shape}, which makes observations {spec.obs_shape}, but the agent's "
            f"input_size is {agent.input_size}: single frames, which the replay buffer stacks, or vectors"
        )
    if spec.num_actions != agent.spec.num_actions:
        raise UserError(f"the environments have {spec.num_actions} actions, the agent {agent.spec.num_actions}")


# A run's settings by the names that they have here.
PUBLISHED = {
    "env.num_envs": "envs.num_envs",
    "agent.num_steps": "nsteps",
    "agent.update_epochs": "num_epochs",
    "agent.num_minibatches": "num_minibatches",
    "agent.optimizer": "optim",
    "agent.learning_rate": "lr",
    "agent.learning_rate_end": "lr_final",
    "agent.learning_rate_decay": "decay_steps",
    "agent.max_grad_norm": "grad_clip",
    "agent.gamma": "gamma",
    "agent.gae_lambda": "lambda_",
    "agent.clip_coef": "policy_clip",
    "agent.ent_coef": "entropy_coeff",
    "agent.ext_coef": "extr_coeff",
    "rnd.coef": "intr_coeff",
    "rnd.gamma": "gamma_intr",
    "rnd.init_steps": "init_obs_steps",
    "tasks.pixel_control": "PC",
    "tasks.reward_prediction": "RP",
    "tasks.value_replay": "VR",
    "tasks.replay_length": "replay_length",
    "tasks.scale_pixels": "norm_pixel_reward",
    "tasks.returns": "returns",
    "seed": "seed",
    "total_steps": "total_steps",
    "device": "device",
    "video_every": "render_freq",
}


def run_config(envs: Any, agent: RANDAL, config: RANDALTrainerConfig) -> PPORunConfig:
    """The run's settings as every run has them, in config.json."""
    values = {**asdict(config), **asdict(agent.config), "envs.num_envs": envs.num_envs, "optim": agent.optimizer_name}
    values |= {"extr_coeff": agent.extr_coeff, "intr_coeff": agent.intr_coeff}
    values |= {"PC": agent.weights["pixel_control"], "RP": agent.weights["reward_prediction"]}
    values |= {"VR": agent.weights["value_replay"]}
    default = PPORunConfig(
        env=config_of(envs),
        agent=PUBLISHED_PPO,
        rnd=PPORNDSettings(init_updates=0),
        dashboard="auto" if config.log_scalars else "off",
    )
    return cast(PPORunConfig, build(default, nest({name: values[ours] for name, ours in PUBLISHED.items()})))
