"""What a run is: frozen settings, named presets, and JSON in and out.

Imports nothing heavy, so that ``--help`` answers at once. Every period names its unit:
steps (agent steps over all environments), frames (emulator frames, four a step), updates
(gradient steps) or episodes (whole games).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Padding = Literal["zero", "repeat"]


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what would do."""


def _bounded(default: Any, low: float = 0, high: float = math.inf) -> Any:
    """A number that `validate` holds between `low` and `high`."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class EnvConfig:
    """The game and how it is played."""

    id: str = "ALE/Gravitar-v5"
    """Gymnasium's id. `ALE/<Game>-v5` runs on ALE's own C++ vector environment."""
    obs_type: Literal["image", "ram"] = "image"
    """What the agent of an ALE game sees: 84x84 grey frames, or the console's 128 bytes of RAM."""
    num_envs: int = _bounded(128, low=1)
    """Games played side by side."""
    num_threads: int = _bounded(0)
    """Emulator threads; 0 takes one for each core."""
    sticky_actions: float = _bounded(0.25, high=1)
    """Probability that the emulator repeats the last action instead of the chosen one."""
    noop_max: int = _bounded(30)
    """An ALE game starts with no-ops of up to this many emulator frames."""
    max_frames: int = _bounded(108_000, low=1)
    """A game is cut off (truncated) after this many emulator frames."""


@dataclass(frozen=True)
class RNDConfig:
    """Curiosity: Random Network Distillation (Burda 2018)."""

    coef: float = _bounded(0.0)
    """Weight of the normalized bonus in the reward that is learned; 0 builds no curiosity at all."""
    variant: Literal["rnd", "notebook"] = "rnd"
    """`notebook` is the original's bonus with its faults: a predictor that never learns and sees 0..255."""
    learning_rate: float = _bounded(1e-4)
    """Adam's, for the predictor."""
    update_frequency: int = _bounded(4, low=1)
    """Gradient steps of the Q network from one of the predictor's, on a batch of the same size, to the next."""
    gamma: float = _bounded(0.99, high=1)
    """Discount of the intrinsic return whose standard deviation scales the bonus."""
    init_updates: int = _bounded(200)
    """Gradient steps of the predictor before there is a bonus: an untrained one's errors are all large."""


@dataclass(frozen=True)
class DQNConfig:
    """Replay, Q-learning and exploration."""

    network: Literal["layer_norm", "plain", "notebook"] = "layer_norm"
    """layer_norm: 512 wide with LayerNorm, orthogonal, one linear layer each for value and advantages; plain: the same
    without LayerNorm; notebook: the original's."""
    ram_bits: bool = True
    """RAM only: show the network every byte's bits too."""
    ram_change: bool = True
    """RAM only: show the network every byte's change since the step before too."""
    policy: Literal["target", "online"] = "target"
    """The network that plays, is evaluated and filmed: the averaged one, which does not change its mind at every
    gradient step, or the one that learns."""
    buffer_size: int = _bounded(500_000, low=1)
    """Transitions the replay buffer can sample from."""
    learning_starts: int = _bounded(20_000)
    """Learning begins when more transitions than this are stored."""
    stack_padding: Padding = "zero"
    """What a stack of pictures holds before a game's first: zeros, or that frame again (as RAM always does)."""
    batch_size: int = _bounded(128, low=1)
    """Transitions in a gradient step."""
    clock: Literal["steps", "episodes"] = "steps"
    """The unit of train_frequency, target_network_frequency and epsilon_decay."""
    train_frequency: int = _bounded(32, low=1)
    """Clock units from one round of gradient steps to the next."""
    gradient_steps: int = _bounded(1, low=1)
    """Gradient steps in a round."""
    target_network_frequency: int = _bounded(0)
    """Clock units from one update of the target network to the next; 0: at every gradient step."""
    tau: float = _bounded(0.005, high=1)
    """Share of the Q network that goes into the target network at each of its updates; 1 copies."""
    learning_rate: float = _bounded(2e-4)
    """Adam's, for the Q network, at the start."""
    learning_rate_end: float = _bounded(0.0)
    """After learning_rate_decay steps."""
    learning_rate_decay: int = _bounded(0)
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    adam_epsilon: float = _bounded(1e-5)
    """Adam's denominator term."""
    max_grad_norm: float = _bounded(10.0)
    """The Q network's gradient is clipped to this norm; 0 never clips."""
    gamma: float = _bounded(0.997, high=1)
    """Discount per step."""
    n_step: int = _bounded(5, low=1)
    """Rewards summed before the bootstrap."""
    double_q: bool = True
    """The online network chooses the bootstrap action, the target network values it (van Hasselt 2016)."""
    reward_scale: float = _bounded(0.004, low=-math.inf)
    """Multiplies the game's score before it is learned."""
    time_limit_is_terminal: bool = False
    """Treat a time-out as a death, as the notebook did. Right is False: a time-out bootstraps."""
    priority_exponent: float = _bounded(0.0)
    """Sampling probability ~ |TD error| ** this (Schaul 2015); 0 samples uniformly."""
    importance_exponent: float = _bounded(0.5)
    """Correction of the sampling bias: weight ~ (N * probability) ** -this."""
    epsilon_start: float = _bounded(1.0, high=1)
    """Probability of a random action at the start."""
    epsilon_end: float = _bounded(0.4, high=1)
    """Probability of a random action after epsilon_decay clock units."""
    epsilon_decay: int = _bounded(300_000, low=1)
    """Clock units over which epsilon falls linearly."""
    epsilon_ladder: float = _bounded(7.0)
    """Environment i of N ends at epsilon_end ** (1 + this * i / (N - 1)) (Horgan 2018); 0: all alike."""


@dataclass(frozen=True)
class PPOAgentConfig:
    """Proximal Policy Optimization (Schulman 2017) with an extrinsic and an intrinsic value head (Burda 2018)."""

    num_steps: int = _bounded(128, low=1)
    """Steps of every environment in a rollout."""
    update_epochs: int = _bounded(3, low=1)
    """Passes over a rollout."""
    num_minibatches: int = _bounded(8, low=1)
    """Gradient steps in a pass."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Of the policy, and of the predictor."""
    learning_rate: float = _bounded(3e-4, low=1e-12)
    """The optimizer's at the start."""
    learning_rate_end: float = _bounded(3e-4)
    """After learning_rate_decay steps."""
    learning_rate_decay: int = _bounded(0)
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    max_grad_norm: float = _bounded(0.5)
    """Gradients of policy and predictor are clipped to this norm, each; 0 never clips."""
    gamma: float = _bounded(0.997, high=1)
    """Discount per step of the score."""
    gae_lambda: float = _bounded(0.95, high=1)
    """Generalized advantage estimation's lambda, for both streams of reward."""
    normalize_advantages: bool = True
    """Bring the advantages of a rollout to mean 0 and standard deviation 1."""
    clip_coef: float = _bounded(0.2)
    """The policy's ratio is clipped to 1 +- this."""
    ent_coef: float = _bounded(0.01)
    """Weight of the policy's entropy."""
    ext_coef: float = _bounded(2.0)
    """Weight of the advantages of the score."""
    clip_rewards: bool = False
    """Learn the score clipped to [-1, 1] at each step; what is told stays raw."""
    reward_scale: float = _bounded(0.004, low=-math.inf)
    """Multiplies that."""


@dataclass(frozen=True)
class PPORNDConfig:
    """Curiosity beside PPO: the paper's form (Burda 2018), with a value head of its own."""

    coef: float = _bounded(1.0)
    """Weight of the intrinsic advantages; 0 builds no predictor and no bonus."""
    gamma: float = _bounded(0.99, high=1)
    """Discount per step of the bonus, whose returns no game's end cuts."""
    init_steps: int = _bounded(600, low=1)
    """Random steps of every environment that start the observation statistics; they count as steps."""
    init_updates: int = _bounded(200)
    """Gradient steps of the predictor before there is a bonus: an untrained one's errors would set its scale."""


@dataclass(frozen=True)
class TasksConfig:
    """UNREAL's auxiliary tasks (Jaderberg 2016), learned from a replay of single frames. Weight 0 builds nothing.

    Each task's gradient is clipped alone, to agent.max_grad_norm, and then weighed.
    """

    pixel_control: float = _bounded(0.1)
    """Weight of pixel control's gradient; image games only."""
    reward_prediction: float = _bounded(0.1)
    """Weight of reward prediction's gradient."""
    value_replay: float = _bounded(0.1)
    """Weight of value replay's gradient."""
    replay_length: int = _bounded(2_000, low=1)
    """Steps of every environment that the replay keeps."""
    window: int = _bounded(20, low=1, high=255)
    """Steps of a sampled window."""
    num_windows: int = _bounded(8, low=1)
    """Windows sampled for a gradient step, for each task anew."""
    reward_batch: int = _bounded(64, low=32)
    """Observations sampled for a gradient step of reward prediction, half of them before a reward."""
    pixel_gamma: float = _bounded(0.9, high=1)
    """Discount per step of pixel control."""
    scale_pixels: bool = True
    """Measure pixel changes between the darkest and brightest pixel seen instead of 0 and 255."""
    returns: Literal["nstep", "gae"] = "nstep"
    """What value replay learns: the n-step return of a window, or its lambda-return."""


@dataclass(frozen=True)
class RunConfig:
    """A training run, whatever the agent. Settings marked (free) may be changed at a resume; the others may not."""

    preset: Annotated[str, tyro.conf.Suppress] = "gravitar"
    env: EnvConfig = field(default_factory=EnvConfig)
    seed: int = _bounded(742, high=2**30)  # the emulator's seeds, this plus steps played, have 31 bits
    """Seeds the networks, exploration, sampling and the games."""
    total_steps: int = _bounded(10_000_000, low=1)
    """The run ends after this many agent steps over all environments. (free)"""
    total_episodes: int = _bounded(0)
    """The run ends after this many games; 0: no such limit. (free)"""
    total_minutes: float = _bounded(0.0)
    """The run ends after this many minutes of training, those before a resume included; 0: no such limit. (free)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. (free)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; auto takes bf16 where the device computes it natively. (free)"""
    execution: Literal["auto", "eager", "graphs"] = "auto"
    """How the networks run: graphs replays CUDA graphs, auto takes those on a GPU; eager always works. (free)"""
    log_seconds: float = _bounded(2.0)
    """Seconds from one row of metrics.csv to the next; 0: a row every step. (free)"""
    dashboard: str = "auto"
    """auto: a Visdom server on this machine, started if none answers; off; or a server's URL. (free)"""
    video_every: int = _bounded(25)
    """Record a game with the present policy every this many episodes; 0: never. (free)"""
    video_dir: str = "videos"
    """Recordings go to <video_dir>/<name of the run's folder>/. (free)"""
    checkpoint_minutes: float = _bounded(10.0, low=1e-4)
    """Minutes from one checkpoint to the next. (free)"""
    checkpoint_replay: bool = False
    """Save the replay buffer in checkpoints too: a resumed run then learns on at once. (free)"""
    keep_checkpoints: int = _bounded(2, low=1)
    """Newest checkpoints that stay in the run's folder. (free)"""

    @property
    def stack_padding(self) -> Padding:
        """What a stack holds before a game's first frame."""
        return "repeat" if self.env.obs_type == "ram" else "zero"  # of RAM the change since the step before is shown


@dataclass(frozen=True)
class Config(RunConfig):
    """A run of the DQN agent."""

    agent: DQNConfig = field(default_factory=DQNConfig)
    rnd: RNDConfig = field(default_factory=RNDConfig)

    @property
    def stack_padding(self) -> Padding:
        """What a stack holds before a game's first frame."""
        return "repeat" if self.env.obs_type == "ram" else self.agent.stack_padding


@dataclass(frozen=True)
class RANDALConfig(RunConfig):
    """A run of RANDAL: PPO with curiosity and auxiliary tasks."""

    preset: Annotated[str, tyro.conf.Suppress] = "randal"
    agent: PPOAgentConfig = field(default_factory=PPOAgentConfig)
    rnd: PPORNDConfig = field(default_factory=PPORNDConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark is asked for."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_envs: int = _bounded(128, low=1)
    """Games that we play side by side."""
    rounds: int = _bounded(10, low=1)
    """Turns that each contender of a comparison gets."""
    seconds: float = _bounded(8.0, low=0.01, high=3_600)
    """Length of a turn of whole training; a contender finishes what it has begun."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Frames in the replay buffer; those that do not fit are left out."""
    peers: bool = True
    """Also the notebook's way and, where it is installed (extra `bench`), Stable-Baselines3."""
    quick: bool = False
    """Everything short, and less of it: two minutes instead of about twenty, on two quiet cores."""
    json: Path | None = None
    """Write the figures to this file."""


FREE_FIELDS = frozenset(
    "total_steps total_episodes total_minutes device precision execution log_seconds dashboard video_every video_dir "
    "checkpoint_minutes checkpoint_replay keep_checkpoints".split()
)

PRETRAINED = Path(__file__).resolve().parent / "pretrained"  # weights that ship

GRAVITAR = Config()
PUBLISHED_PPO = PPOAgentConfig(  # RND's and RANDAL's
    update_epochs=4,
    num_minibatches=4,
    learning_rate=1e-4,
    learning_rate_end=1e-4,
    gamma=0.999,
    normalize_advantages=False,
    clip_coef=0.1,
    ent_coef=0.001,
    clip_rewards=True,
    reward_scale=1.0,
)
NO_TASKS = TasksConfig(pixel_control=0.0, reward_prediction=0.0, value_replay=0.0)
RANDAL_PRESET = RANDALConfig(  # games of at most 4 500 steps, as published
    env=EnvConfig(num_envs=64, max_frames=18_000), rnd=PPORNDConfig(coef=0.5)
)
PPO = RANDALConfig(preset="ppo", env=EnvConfig(num_envs=64), rnd=PPORNDConfig(coef=0.0), tasks=NO_TASKS)

PRESETS: Mapping[str, RunConfig] = types.MappingProxyType(
    {
        "gravitar": GRAVITAR,
        "breakout": replace(
            GRAVITAR,
            preset="breakout",
            env=EnvConfig(id="ALE/Breakout-v5"),
            agent=DQNConfig(reward_scale=1.0),
        ),
        "gravitar-ram": replace(
            GRAVITAR,
            preset="gravitar-ram",
            env=EnvConfig(obs_type="ram", num_envs=64),
            agent=DQNConfig(buffer_size=1_000_000, batch_size=512, train_frequency=64, gradient_steps=2),
        ),
        "cartpole": replace(
            GRAVITAR,
            preset="cartpole",
            env=EnvConfig(id="CartPole-v1", num_envs=4),
            agent=DQNConfig(
                network="notebook",
                policy="online",
                buffer_size=50_000,
                learning_starts=1_000,
                batch_size=256,
                train_frequency=2,
                target_network_frequency=500,
                tau=1.0,
                learning_rate=2.5e-4,
                adam_epsilon=1e-8,
                gamma=0.99,
                n_step=3,
                reward_scale=0.1,
                priority_exponent=0.0,
                epsilon_end=0.02,
                epsilon_decay=5_000,
                epsilon_ladder=0.0,
            ),
            total_steps=300_000,
            precision="fp32",
        ),
        "notebook": replace(
            GRAVITAR,
            preset="notebook",
            env=EnvConfig(id="Gravitar-v0", num_envs=1),
            agent=DQNConfig(
                network="notebook",
                policy="online",
                buffer_size=50_000,
                learning_starts=2_000,
                stack_padding="repeat",
                batch_size=128,
                clock="episodes",
                train_frequency=1,
                gradient_steps=10,
                target_network_frequency=100,
                tau=1.0,
                learning_rate=1e-4,
                adam_epsilon=1e-8,
                gamma=0.99,
                max_grad_norm=0.0,
                n_step=1,
                double_q=False,
                reward_scale=1 / 500,
                time_limit_is_terminal=True,
                priority_exponent=0.0,
                epsilon_start=0.5,
                epsilon_end=0.02,
                epsilon_decay=960,  # 0.48 at 1/2000 an episode
                epsilon_ladder=0.0,
            ),
            rnd=RNDConfig(coef=1 / 500, variant="notebook", update_frequency=1),
            precision="fp32",
        ),
        "randal": RANDAL_PRESET,
        "ppo": PPO,
        "ppo-rnd": replace(PPO, preset="ppo-rnd", rnd=PPORNDConfig(coef=0.5)),
        "randal-cartpole": replace(
            RANDAL_PRESET,
            preset="randal-cartpole",
            env=EnvConfig(id="CartPole-v1", num_envs=16),
            agent=replace(
                PUBLISHED_PPO,
                num_steps=32,
                learning_rate=1e-3,
                learning_rate_end=0.0,
                learning_rate_decay=200_000,
                gamma=0.99,
                clip_coef=0.2,
                ent_coef=0.01,
                reward_scale=0.1,
            ),
            rnd=PPORNDConfig(coef=0.5, init_steps=250, init_updates=0),
            tasks=TasksConfig(pixel_control=0.0, reward_prediction=1.0, value_replay=1.0),
            total_steps=200_000,
            precision="fp32",
        ),
    }
)


def get_preset(name: str) -> RunConfig:
    """The preset called `name`; UserError names the nearest one otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    if (Path(name) / "config.json").exists():
        raise UserError(f"{name} is a run's folder, not a preset: --resume {name} goes on with it")
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown preset {name!r}: {hint}there are {', '.join(PRESETS)}")


def validate(config: RunConfig) -> None:
    """Raise UserError for the first setting that cannot work."""
    check_bounds(config)
    if isinstance(config, Config):
        agent = config.agent
        needed = max(agent.learning_starts, agent.n_step * config.env.num_envs)
        if agent.buffer_size <= needed:
            raise UserError(
                f"agent.buffer_size is {agent.buffer_size}: learning would never begin, it must be above {needed} "
                "(agent.learning_starts, and agent.n_step steps of every environment)"
            )
    if isinstance(config, RANDALConfig):
        rows, parts = config.agent.num_steps * config.env.num_envs, config.agent.num_minibatches
        if rows % parts:
            raise UserError(
                f"agent.num_minibatches is {parts}: it must divide the {rows} steps of a rollout "
                "(agent.num_steps times env.num_envs)"
            )


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Raise UserError for the first number of a dataclass that is outside its field's bounds."""
    for setting in dataclasses.fields(settings):
        if dataclasses.is_dataclass(inner := getattr(settings, setting.name)):
            check_bounds(inner, f"{prefix}{setting.name}.")
        if "low" not in setting.metadata:
            continue
        value, low, high = getattr(settings, setting.name), setting.metadata["low"], setting.metadata["high"]
        if not (low <= value <= high and math.isfinite(value)):  # a NaN is in no range
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            name = setting.name.replace("_", "-") if prefix == "--" else setting.name
            raise UserError(f"{prefix}{name} is {value}: it must be finite and {bounds}")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that `to_dict` gave; UserError names an unknown, missing or ill-typed setting."""
    if not isinstance(values, Mapping):
        raise UserError("setting config is not a table of settings")
    default = PRESETS.get(str(values.get("preset")), GRAVITAR)
    # Free settings are no part of what a run is: one that is newer than the file takes its default.
    free = {name: getattr(default, name) for name in FREE_FIELDS}
    return typing.cast(RunConfig, _build(type(default), {**free, **values}, ""))


def _build(cls: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"setting {prefix.rstrip('.') or 'config'} is not a table of settings")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"unknown setting {prefix}{unknown[0]}: was it written by another version?")
    if missing := sorted(names - set(values)):
        raise UserError(f"setting {prefix}{missing[0]} is missing: was it written by another version?")
    return cls(**{name: _value(hints[name], values[name], prefix + name) for name in names})


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, name + ".")
    if typing.get_origin(hint) is Literal:
        fits, expected = value in typing.get_args(hint), " or ".join(map(str, typing.get_args(hint)))
    elif hint is float:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, expected = type(value) is hint, hint.__name__
    if not fits:
        raise UserError(f"setting {name} is {value!r}: it must be {expected}")
    return float(value) if hint is float else value


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names: {"env": {"id": 1}} -> {"env.id": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": v for key, v in inner.items()}
    return flat


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What a resume may not change, as lines `name: old -> new`."""
    after = flatten(to_dict(new))
    return [
        f"{name}: {value} -> {after[name]}"
        for name, value in flatten(to_dict(old)).items()
        if value != after[name] and name not in FREE_FIELDS
    ]


def load_run(run_dir: Path) -> RunConfig:
    """The configuration in a run's folder (`config.json`); UserError when it is no such folder."""
    path = run_dir / "config.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run's folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, Mapping) or "config" not in record:
        raise UserError(f"{path} is not a run's configuration")
    return from_dict(record["config"])
