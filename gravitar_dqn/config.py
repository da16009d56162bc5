"""What a run is: frozen settings, a sentence under each.

Imports nothing heavy, so that ``--help`` answers at once. Every period names its unit:
steps (agent steps over all environments), frames (emulator frames, four a step), updates
(gradient steps) or episodes (whole games).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import tyro

from gravitar_dqn.errors import SettingError, UserError

Padding = Literal["zero", "repeat"]


def bounded(default: Any, low: float = 0, high: float = math.inf) -> Any:
    """A number that `check_bounds` holds between `low` and `high`."""
    return field(default=default, metadata={"low": low, "high": high})


def divided(name: str, value: int, ranks: int, unit: int = 1) -> int:
    """A setting's part for each of `ranks`, a multiple of `unit`; SettingError names one that cannot be divided."""
    parts = ranks * unit
    if value % parts:
        lower, upper = value // parts * parts, (value // parts + 1) * parts
        would = f"{lower} and {upper}" if lower else str(upper)
        raise SettingError(name, f"is {value}, which {ranks} ranks cannot share evenly: {would} can be divided")
    return value // ranks


@dataclass(frozen=True)
class EnvSettings:
    """The game and how it is played."""

    id: str = "ALE/Gravitar-v5"
    """Gymnasium's id. `ALE/<Game>-v5` runs on ALE's own C++ vector environment."""
    obs_type: Literal["image", "ram"] = "image"
    """What the agent of an ALE game sees: 84x84 grey frames, or the console's 128 bytes of RAM."""
    num_envs: int = bounded(128, low=1)
    """Games played side by side."""
    num_threads: int = bounded(0)
    """Emulator threads; 0 takes one for each core. (free)"""
    sticky_actions: float = bounded(0.25, high=1)
    """Probability that the emulator repeats the last action instead of the chosen one."""
    noop_max: int = bounded(30)
    """An ALE game starts with no-ops of up to this many emulator frames."""
    max_frames: int = bounded(108_000, low=1)
    """A game is cut off (truncated) after this many emulator frames."""


@dataclass(frozen=True)
class RNDSettings:
    """Curiosity: Random Network Distillation (Burda 2018)."""

    coef: float = bounded(0.0)
    """Weight of the normalized bonus in the reward that is learned; 0 builds no curiosity at all. Gravitar from RAM
    scored a tenth less with 0.1 in equal time."""
    variant: Literal["rnd", "notebook"] = "rnd"
    """`notebook` is the original's bonus with its faults: a predictor that never learns and sees 0..255."""
    learning_rate: float = bounded(1e-4)
    """Adam's, for the predictor."""
    update_frequency: int = bounded(4, low=1)
    """Gradient steps of the Q network from one of the predictor's, on a batch of the same size, to the next."""
    gamma: float = bounded(0.99, high=1)
    """Discount of the intrinsic return whose standard deviation scales the bonus."""
    init_updates: int = bounded(200)
    """Gradient steps of the predictor before there is a bonus: an untrained one's errors are all large."""


@dataclass(frozen=True)
class DQNSettings:
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
    buffer_size: int = bounded(500_000, low=1)
    """Transitions the replay buffer can sample from."""
    learning_starts: int = bounded(20_000)
    """Learning begins when more transitions than this are stored."""
    stack_padding: Padding = "zero"
    """What a stack of pictures holds before a game's first: zeros, or that frame again (as RAM always does)."""
    batch_size: int = bounded(128, low=1)
    """Transitions in a gradient step."""
    clock: Literal["steps", "episodes"] = "steps"
    """The unit of train_frequency, target_network_frequency and epsilon_decay."""
    train_frequency: int = bounded(32, low=1)
    """Clock units from one round of gradient steps to the next."""
    gradient_steps: int = bounded(1, low=1)
    """Gradient steps in a round."""
    target_network_frequency: int = bounded(0)
    """Clock units from one update of the target network to the next; 0: at every gradient step."""
    tau: float = bounded(0.005, high=1)
    """Share of the Q network that goes into the target network at each of its updates; 1 copies."""
    learning_rate: float = bounded(2e-4)
    """Adam's, for the Q network, at the start."""
    learning_rate_end: float = bounded(0.0)
    """After learning_rate_decay steps."""
    learning_rate_decay: int = bounded(0)
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    adam_epsilon: float = bounded(1e-5)
    """Adam's denominator term."""
    max_grad_norm: float = bounded(10.0)
    """The Q network's gradient is clipped to this norm; 0 never clips."""
    gamma: float = bounded(0.997, high=1)
    """Discount per step."""
    n_step: int = bounded(5, low=1)
    """Rewards summed before the bootstrap."""
    double_q: bool = True
    """The online network chooses the bootstrap action, the target network values it (van Hasselt 2016)."""
    reward_scale: float = bounded(0.004, low=-math.inf)
    """Multiplies the game's score before it is learned."""
    time_limit_is_terminal: bool = False
    """Treat a time-out as a death, as the notebook did. Right is False: a time-out bootstraps."""
    priority_exponent: float = bounded(0.0)
    """Sampling probability ~ |TD error| ** this (Schaul 2015); 0 samples uniformly."""
    importance_exponent: float = bounded(0.5)
    """Correction of the sampling bias: weight ~ (N * probability) ** -this."""
    epsilon_start: float = bounded(1.0, high=1)
    """Probability of a random action at the start."""
    epsilon_end: float = bounded(0.4, high=1)
    """Probability of a random action after epsilon_decay clock units."""
    epsilon_decay: int = bounded(300_000, low=1)
    """Clock units over which epsilon falls linearly."""
    epsilon_ladder: float = bounded(7.0)
    """Environment i of N ends at epsilon_end ** (1 + this * i / (N - 1)) (Horgan 2018); 0: all alike."""


@dataclass(frozen=True)
class PPOSettings:
    """Proximal Policy Optimization (Schulman 2017) with an extrinsic and an intrinsic value head (Burda 2018)."""

    num_steps: int = bounded(128, low=1)
    """Steps of every environment in a rollout."""
    update_epochs: int = bounded(3, low=1)
    """Passes over a rollout."""
    num_minibatches: int = bounded(8, low=1)
    """Gradient steps in a pass."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Of the policy, and of the predictor."""
    learning_rate: float = bounded(3e-4, low=1e-12)
    """The optimizer's at the start."""
    learning_rate_end: float = bounded(3e-4)
    """After learning_rate_decay steps."""
    learning_rate_decay: int = bounded(0)
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    max_grad_norm: float = bounded(0.5)
    """Gradients of policy, predictor and every task are clipped to this norm, each alone; 0 never clips."""
    gamma: float = bounded(0.997, high=1)
    """Discount per step of the score."""
    gae_lambda: float = bounded(0.95, high=1)
    """Generalized advantage estimation's lambda, for both streams of reward."""
    normalize_advantages: bool = True
    """Bring the advantages of a rollout to mean 0 and standard deviation 1."""
    clip_coef: float = bounded(0.2)
    """The policy's ratio is clipped to 1 +- this."""
    ent_coef: float = bounded(0.01)
    """Weight of the policy's entropy."""
    ext_coef: float = bounded(2.0)
    """Weight of the advantages of the score."""
    clip_rewards: bool = False
    """Learn the score clipped to [-1, 1] at each step; logged scores stay raw."""
    reward_scale: float = bounded(0.004, low=-math.inf)
    """Multiplies that."""


@dataclass(frozen=True)
class PPORNDSettings:
    """Curiosity beside PPO: the paper's form (Burda 2018), with a value head of its own."""

    coef: float = bounded(0.1)
    """Weight of the normalized bonus beside the score (published: 1); 0 builds no predictor and no bonus."""
    gamma: float = bounded(0.99, high=1)
    """Discount per step of the bonus, whose returns no game's end cuts."""
    init_steps: int = bounded(600, low=1)
    """Random steps of every environment that start the observation statistics; they count as steps."""
    init_updates: int = bounded(200)
    """Gradient steps of the predictor before there is a bonus: an untrained one's errors would set its scale."""


@dataclass(frozen=True)
class TaskSettings:
    """UNREAL's auxiliary tasks (Jaderberg 2016), learned from a replay of single frames. Weight 0 builds nothing.

    Each task's gradient is clipped alone, to agent.max_grad_norm, and then weighed.
    """

    pixel_control: float = bounded(1.0)
    """Weight of pixel control's gradient; image games only."""
    reward_prediction: float = bounded(0.01)
    """Weight of reward prediction's gradient."""
    value_replay: float = bounded(0.1)
    """Weight of value replay's gradient."""
    replay_length: int = bounded(2_000, low=1)
    """Steps of every environment that the replay keeps."""
    window: int = bounded(20, low=1, high=255)
    """Steps of a sampled window."""
    num_windows: int = bounded(8, low=1)
    """Windows sampled for a gradient step, for each task anew."""
    reward_batch: int = bounded(64, low=32)
    """Observations sampled for a gradient step of reward prediction, half of them before a reward."""
    pixel_gamma: float = bounded(0.9, high=1)
    """Discount per step of pixel control."""
    scale_pixels: bool = True
    """Measure pixel changes between the darkest and brightest pixel seen instead of 0 and 255."""
    returns: Literal["nstep", "gae"] = "nstep"
    """What value replay learns: the n-step return of a window, or its lambda-return."""


@dataclass(frozen=True)
class RunConfig:
    """A training run, whatever the agent. Settings marked (free) may be changed at a resume; the others may not."""

    preset: Annotated[str, tyro.conf.Suppress] = "gravitar"
    env: EnvSettings = field(default_factory=EnvSettings)
    seed: int = bounded(742, high=2**30)  # the emulator's seeds, this plus steps played, have 31 bits
    """Seeds the networks, exploration, sampling and the games."""
    total_steps: int = bounded(10_000_000, low=1)
    """The run ends after this many agent steps over all environments. (free)"""
    total_episodes: int = bounded(0)
    """The run ends after this many games; 0: no such limit. (free)"""
    total_minutes: float = bounded(0.0)
    """The run ends after this many minutes of training, those before a resume included; 0: no such limit. (free)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. (free)"""
    threads: int = bounded(0, high=1_024)
    """Processor threads of the networks' arithmetic; 0: as many as torch takes, one for each core. (free)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; auto takes bf16 where the device computes it natively. (free)"""
    execution: Literal["auto", "eager", "graphs"] = "auto"
    """How the networks run: graphs replays CUDA graphs, auto takes those on a GPU; eager always works. (free)"""
    log_seconds: float = bounded(2.0)
    """Seconds from one row of metrics.csv to the next; 0: a row every step. (free)"""
    dashboard: str = "auto"
    """auto: a Visdom server on this machine, started if none answers; off; or a server's URL. (free)"""
    video_every: int = bounded(25)
    """Record a game with the present policy every this many episodes; 0: never. (free)"""
    video_dir: str = "videos"
    """Recordings go to <video_dir>/<name of the run's folder>/. (free)"""
    eval_every: int = bounded(0)
    """Evaluate the present policy every this many steps, in another process under idle priority; the best is kept as
    checkpoints/best; 0: never. (free)"""
    eval_episodes: int = bounded(100, low=1)
    """Whole games of such an evaluation. (free)"""
    checkpoint_minutes: float = bounded(10.0, low=1e-4)
    """Minutes from one checkpoint to the next. (free)"""
    checkpoint_replay: bool = False
    """Save the replay buffer in checkpoints too: a resumed run then learns on at once. (free)"""
    keep_checkpoints: int = bounded(2, low=1)
    """Newest checkpoints that stay in the run's folder. (free)"""

    rank_timeout: float = bounded(300.0, low=1)
    """torchrun only: seconds after which a rank that does not answer ends the run. (free)"""

    @property
    def stack_padding(self) -> Padding:
        """What a stack holds before a game's first frame."""
        return "repeat" if self.env.obs_type == "ram" else "zero"  # of RAM the change since the step before is shown

    @property
    def first_update(self) -> int:
        """Steps that are played before the first gradient step."""
        return 0

    @property
    def counts_episodes(self) -> bool:
        """Whether schedules run by episodes, as the notebook's did; its charts do too then."""
        return False

    def check(self) -> None:
        """Raise UserError for settings that do not go together."""

    def share(self, rank: int, ranks: int) -> Self:
        """What rank `rank` of `ranks` plays and learns of this run, with random numbers of its own.

        What is said for the whole run is divided; UserError for what cannot be.
        """
        num_envs = divided("env.num_envs", self.env.num_envs, ranks)
        return replace(self, env=replace(self.env, num_envs=num_envs), seed=self.seed + rank * num_envs)


@dataclass(frozen=True)
class DQNRunConfig(RunConfig):
    """A run of the DQN agent."""

    agent: DQNSettings = field(default_factory=DQNSettings)
    rnd: RNDSettings = field(default_factory=RNDSettings)

    @property
    def stack_padding(self) -> Padding:
        """What a stack holds before a game's first frame."""
        return "repeat" if self.env.obs_type == "ram" else self.agent.stack_padding

    @property
    def first_update(self) -> int:
        """Steps that are played before the first gradient step."""
        return max(self.agent.learning_starts, self.agent.n_step * self.env.num_envs)

    @property
    def counts_episodes(self) -> bool:
        """Whether schedules run by episodes."""
        return self.agent.clock == "episodes"

    def check(self) -> None:
        """Raise UserError for a replay buffer in which learning would never begin."""
        agent, needed = self.agent, self.first_update
        if agent.buffer_size <= needed:
            raise UserError(
                f"agent.buffer_size is {agent.buffer_size}: learning would never begin, it must be above {needed} "
                "(agent.learning_starts, and agent.n_step steps of every environment)"
            )

    def share(self, rank: int, ranks: int) -> Self:
        """Games, batch and replay buffer are divided; learning begins when all ranks together have stored enough."""
        if self.rnd.coef and self.rnd.variant == "notebook":
            raise SettingError("rnd.variant", "is notebook, which is for one process: several ranks need rnd")
        agent = replace(
            self.agent,
            batch_size=divided("agent.batch_size", self.agent.batch_size, ranks),
            buffer_size=divided("agent.buffer_size", self.agent.buffer_size, ranks),
            learning_starts=self.first_update,
        )
        return replace(super().share(rank, ranks), agent=agent)


@dataclass(frozen=True)
class PPORunConfig(RunConfig):
    """A run of PPO, with curiosity and auxiliary tasks or without: RANDAL is all of them."""

    preset: Annotated[str, tyro.conf.Suppress] = "randal"
    agent: PPOSettings = field(default_factory=PPOSettings)
    rnd: PPORNDSettings = field(default_factory=PPORNDSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)

    @property
    def first_update(self) -> int:
        """Steps that are played before the first gradient step."""
        random_steps = self.rnd.init_steps if self.rnd.coef else 0
        return (random_steps + self.agent.num_steps) * self.env.num_envs

    def check(self) -> None:
        """Raise UserError for a rollout that does not fall into minibatches."""
        rows, parts = self.agent.num_steps * self.env.num_envs, self.agent.num_minibatches
        if rows % parts:
            complaint = f"is {parts}: it must divide the {rows} steps of a rollout, of {self.env.num_envs} environments"
            raise SettingError("agent.num_minibatches", complaint)

    def share(self, rank: int, ranks: int) -> Self:
        """Games, and what a gradient step samples for the tasks, are divided."""
        tasks = replace(
            self.tasks,
            num_windows=divided("tasks.num_windows", self.tasks.num_windows, ranks),
            reward_batch=divided("tasks.reward_batch", self.tasks.reward_batch, ranks, unit=2),
        )
        ours = replace(super().share(rank, ranks), tasks=tasks)
        ours.check()
        return ours


FREE_FIELDS = frozenset(
    "total_steps total_episodes total_minutes device threads precision execution log_seconds dashboard video_every "
    "video_dir eval_every eval_episodes checkpoint_minutes checkpoint_replay keep_checkpoints rank_timeout "
    "env.num_threads".split()
)


# ---------------------------------------------------------------- settings as plain tables: JSON, bounds, comparison


def validate(config: RunConfig) -> None:
    """Raise UserError for the first setting that cannot work."""
    check_bounds(config)
    config.check()


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
            raise SettingError(f"{prefix}{name}", f"is {value}: it must be finite and {bounds}")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def build(default: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass `default` with the values in a table; UserError names an unknown or ill-typed setting."""
    if not isinstance(values, Mapping):
        raise UserError(f"setting {prefix.rstrip('.') or 'config'} is not a table of settings")
    hints = typing.get_type_hints(type(default))
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(default)}):
        raise UserError(f"unknown setting {prefix}{unknown[0]}: was it written by another version?")
    changed = {
        name: _value(hints[name], value, prefix + name, getattr(default, name)) for name, value in values.items()
    }
    return dataclasses.replace(default, **changed)


def _value(hint: Any, value: Any, name: str, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(default, value, name + ".")
    if typing.get_origin(hint) is Literal:
        fits, expected = value in typing.get_args(hint), " or ".join(map(str, typing.get_args(hint)))
    elif hint is float:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        fits, expected = type(value) is hint, hint.__name__
    if not fits:
        raise SettingError(name, f"is {value!r}: it must be {expected}")
    return float(value) if hint is float else value


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names: {"env": {"id": 1}} -> {"env.id": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": v for key, v in inner.items()}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flatten` made flat: {"env.id": 1} -> {"env": {"id": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        part, _, last = name.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[last] = value
    return nested


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What a resume may not change: (before, after) by the name of the setting."""
    after = flatten(to_dict(new))
    return {
        name: (value, after.get(name))
        for name, value in flatten(to_dict(old)).items()
        if value != after.get(name) and name not in FREE_FIELDS
    }
