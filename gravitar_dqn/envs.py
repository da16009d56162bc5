"""Games as Gymnasium vector environments, and one more way to play a single game in colour for recordings.

All of them reset with autoreset NEXT_STEP: the step after a game's end plays no action, earns nothing and returns
the next game's first frame.

| game | vector environment | frame |
|---|---|---|
| `ALE/<Game>-v5`, images | ALE's own, in C++ | newest 84x84 frame, uint8 |
| older ALE ids (`Gravitar-v0`), images | Gymnasium's, around `AtariPreprocessing` | newest 84x84 frame, uint8 |
| `ALE/<Game>-v5`, RAM | `RamVectorEnv`, below | 128 bytes, uint8 |
| older ALE ids, RAM | Gymnasium's | 128 bytes, uint8 |
| any other with vector observations | Gymnasium's | the vector, float32 |
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from ale_py import ALEInterface, roms
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import AtariPreprocessing

from gravitar_dqn.config import EnvConfig, UserError

FRAME_SKIP = 4  # emulator frames in an agent step
RAM_BYTES = 128
GymSpec = gym.envs.registration.EnvSpec  # Gymnasium's entry of a game
_MADE_FROM: weakref.WeakKeyDictionary[VectorEnv[Any, Any, Any], EnvConfig] = weakref.WeakKeyDictionary()
EMULATOR_FPS = 60
gym.register_envs(ale_py)


@dataclass(frozen=True)
class EnvSpec:
    """What agents know of their environments."""

    frame_shape: tuple[int, ...]  # of one observation without its stack: (84, 84) or (n,)
    frame_dtype: torch.dtype  # uint8 or float32
    num_actions: int

    @property
    def is_picture(self) -> bool:
        """Whether a frame is a picture."""
        return len(self.frame_shape) == 2

    @property
    def is_ram(self) -> bool:
        """Whether a frame is the console's RAM."""
        return self.frame_shape == (RAM_BYTES,) and self.frame_dtype == torch.uint8

    @property
    def stack(self) -> int:
        """Frames in an observation: four pictures; RAM and what it was a step before; a vector alone."""
        return 4 if self.is_picture else 2 if self.is_ram else 1

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """(4, 84, 84), (2, 128) or (n,)."""
        return self.frame_shape if self.stack == 1 else (self.stack, *self.frame_shape)


def spec_of(envs: VectorEnv[Any, Any, Any]) -> EnvSpec:
    """What agents know of these environments."""
    space = envs.single_observation_space
    shape = space.shape or ()
    shape = tuple(size for size in shape if size != 1) if len(shape) == 3 else shape
    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
    return EnvSpec(shape, dtype, int(envs.single_action_space.n))  # type: ignore[attr-defined]


def spec_of_game(config: EnvConfig) -> EnvSpec:
    """The same for environments that are not made yet."""
    envs = make_envs(replace(config, num_envs=1))
    spec = spec_of(envs)
    envs.close()
    return spec


class RamVectorEnv(VectorEnv[Any, Any, Any]):
    """ALE games seen by their RAM: observations (num_envs, 128) uint8.

    The emulators are played by threads: ALE's interface lets go of Python's lock while it plays, and Gymnasium's own
    vector environments would play one game after the other. Nothing is drawn that nobody looks at.

    Args:
        game: Gymnasium's id, `ALE/<Game>-v5`.
        num_envs: games played side by side.
        num_threads: threads that play them.
        sticky_actions: probability that the emulator repeats the last action instead of the chosen one.
        noop_max: a game starts with no-ops of up to this many emulator frames.
        max_frames: emulator frames after which a game is cut off (truncated).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  (Gymnasium's own way to say it)

    def __init__(
        self, game: str, num_envs: int, num_threads: int, sticky_actions: float, noop_max: int, max_frames: int
    ) -> None:
        rom = roms.get_rom_path(gym.spec(game).kwargs["game"])
        assert rom is not None, "ale_py brings every game's ROM"
        self._rom = rom
        ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # of all that are made from now on: no greeting
        self._games = [ALEInterface() for _ in range(num_envs)]
        for ale in self._games:
            ale.setInt("frame_skip", FRAME_SKIP)
            ale.setFloat("repeat_action_probability", sticky_actions)
            ale.setInt("max_num_frames_per_episode", max_frames)
        self.num_envs, self._noop_max = num_envs, noop_max
        self._random = [np.random.default_rng() for _ in range(num_envs)]  # of the no-ops
        self._seeded = False
        self._ended = np.zeros(num_envs, dtype=np.bool_)
        self._pool = ThreadPoolExecutor(num_threads)
        self._shares = [range(i, num_envs, num_threads) for i in range(num_threads)]
        self._pending: list[Future[None]] = []
        self._games[0].loadROM(self._rom)  # for the actions; `reset` seeds and loads all
        self._actions = list(self._games[0].getMinimalActionSet())
        self.single_observation_space = gym.spaces.Box(0, 255, (RAM_BYTES,), np.uint8)
        self.single_action_space = gym.spaces.Discrete(len(self._actions))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.spec = gym.spec(game)
        self._new_outputs()

    def _new_outputs(self) -> None:
        """Arrays for what a step brings; those of the step before may still be in use."""
        self._obs = np.empty((self.num_envs, RAM_BYTES), dtype=np.uint8)
        self._rewards = np.zeros(self.num_envs)
        self._terminations = np.zeros(self.num_envs, dtype=np.bool_)
        self._truncations = np.zeros(self.num_envs, dtype=np.bool_)

    def _begin(self, i: int) -> None:
        ale = self._games[i]
        ale.reset_game()
        for _ in range(self._random[i].integers(0, self._noop_max // FRAME_SKIP + 1)):
            ale.act(ale_py.Action.NOOP)
        if ale.game_over():  # cut off by a small max_frames
            ale.reset_game()
        ale.getRAM(self._obs[i])

    def _begin_share(self, share: range, which: npt.NDArray[np.bool_], seeds: list[int] | None) -> None:
        for i in share:
            if seeds is not None:
                self._games[i].setInt("random_seed", seeds[i] % 2**31)
                self._games[i].loadROM(self._rom)  # it takes the seed
                self._random[i] = np.random.default_rng(seeds[i])
            if which[i]:
                self._begin(i)
            else:
                self._games[i].getRAM(self._obs[i])

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        """New games, in all environments or where `options["reset_mask"]` (num_envs,) is true.

        Every environment takes a seed of its own from `seed`; without one the first reset draws one.
        """
        if isinstance(seed, list):
            raise TypeError("one seed is needed: each environment takes its own from it")
        mask = (options or {}).get("reset_mask")
        which = np.ones(self.num_envs, dtype=np.bool_) if mask is None else np.asarray(mask)
        seeds = None
        if seed is not None or not self._seeded:
            seeds = [int(own) for own in np.random.SeedSequence(seed).generate_state(self.num_envs)]
            self._seeded = True
        self._new_outputs()
        for done in [self._pool.submit(self._begin_share, share, which, seeds) for share in self._shares]:
            done.result()
        self._ended &= ~which
        return self._obs, {}

    def _play(self, share: range, actions: npt.NDArray[np.int64]) -> None:
        for i in share:
            if self._ended[i]:  # NEXT_STEP autoreset: no action is played, nothing is earned
                self._begin(i)
                continue
            ale = self._games[i]
            self._rewards[i] = ale.act(self._actions[actions[i]])
            self._terminations[i] = ale.game_over(with_truncation=False)
            self._truncations[i] = ale.game_truncated() and not self._terminations[i]
            ale.getRAM(self._obs[i])

    def send(self, actions: npt.NDArray[np.int64]) -> None:
        """Begin a step; `recv` waits for it."""
        self._new_outputs()
        self._pending = [self._pool.submit(self._play, share, actions) for share in self._shares]

    def recv(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """What the step brought: observations, rewards, terminations, truncations, and nothing else."""
        for done in self._pending:
            done.result()
        self._ended = self._terminations | self._truncations
        return self._obs, self._rewards, self._terminations, self._truncations, {}

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of every game."""
        self.send(actions)
        return self.recv()

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool.shutdown()


def make_envs(config: EnvConfig) -> VectorEnv[Any, Any, Any]:
    """`config.num_envs` games side by side; UserError names an unknown game or one the agent cannot play."""
    spec = find_game(config)
    num_threads = min(config.num_threads or available_cores(), config.num_envs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium's word on the old ids
        if is_atari(spec) and config.obs_type == "ram" and spec.vector_entry_point is not None:
            envs: VectorEnv[Any, Any, Any] = RamVectorEnv(
                config.id, config.num_envs, num_threads, config.sticky_actions, config.noop_max, config.max_frames
            )
        elif is_atari(spec) and spec.vector_entry_point is not None:
            envs = gym.make_vec(
                config.id,
                num_envs=config.num_envs,
                vectorization_mode="vector_entry_point",
                num_threads=num_threads,
                repeat_action_probability=config.sticky_actions,
                max_num_frames_per_episode=config.max_frames,
                noop_max=config.noop_max,
                frameskip=FRAME_SKIP,
                stack_num=1,  # the replay buffer stacks
                reward_clipping=False,  # its default clips: scores would lie
                use_fire_reset=False,
            )
        else:
            envs = SyncVectorEnv(
                [lambda: _make_single(config, spec)] * config.num_envs, autoreset_mode=AutoresetMode.NEXT_STEP
            )
    _check_spaces(config, envs)
    _MADE_FROM[envs] = config
    return envs


def config_of(envs: VectorEnv[Any, Any, Any]) -> EnvConfig:
    """What `make_envs` made these of. Of others only the id is known, from Gymnasium's entry, or the class's name."""
    if envs in _MADE_FROM:
        return _MADE_FROM[envs]
    spec = envs.spec or getattr(next(iter(getattr(envs, "envs", ())), None), "spec", None)
    return EnvConfig(id=spec.id if spec is not None else type(envs).__name__, num_envs=envs.num_envs)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def action_names(envs: SyncVectorEnv) -> list[str]:
    """What the game calls its actions; their numbers where it has no names."""
    meanings = getattr(envs.envs[0].unwrapped, "get_action_meanings", None)
    return list(meanings()) if meanings is not None else [str(i) for i in range(spec_of(envs).num_actions)]


def is_atari(spec: GymSpec) -> bool:
    """Whether the game runs in the Arcade Learning Environment."""
    return spec.entry_point == "ale_py.env:AtariEnv"


def make_recorded_env(
    config: EnvConfig, on_frame: Callable[[npt.NDArray[np.uint8]], None]
) -> tuple[SyncVectorEnv, float]:
    """One game that the agent sees as in `make_envs`, and the frames a second at which it plays in real speed.

    `on_frame` gets every picture in colour, (height, width, 3) uint8; for `ALE/` image games every emulator frame.
    """
    spec = find_game(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        env = SyncVectorEnv([lambda: _make_single(config, spec, on_frame)], autoreset_mode=AutoresetMode.NEXT_STEP)
    if not is_atari(spec):
        return env, float(env.metadata.get("render_fps", 30))
    skip = _emulator_skip(config, spec)
    # The oldest ids skip a random number of frames, (2, 5) being 2 to 4.
    frames = sum(range(*skip)) / len(range(*skip)) if isinstance(skip, tuple) else skip
    return env, EMULATOR_FPS / frames


def find_game(config: EnvConfig) -> GymSpec:
    """Gymnasium's entry for the game; UserError names the nearest one where there is none."""
    try:
        return gym.spec(config.id)
    except gym.error.Error as error:
        full = f"ALE/{config.id}-v5"
        hint = f"did you mean {full}?" if full in gym.registry else " ".join(str(error).split())
        raise UserError(f"unknown game {config.id!r}: {hint}") from None


def _emulator_skip(config: EnvConfig, spec: GymSpec) -> int | tuple[int, int]:
    """Frames that the emulator itself skips: what the old ids say, else none for images (the wrapper skips)."""
    if spec.vector_entry_point is None:
        skip: int | tuple[int, int] = spec.kwargs["frameskip"]
        return skip
    return 1 if config.obs_type == "image" else FRAME_SKIP


def _make_single(
    config: EnvConfig, spec: GymSpec, on_frame: Callable[[npt.NDArray[np.uint8]], None] | None = None
) -> gym.Env[Any, Any]:
    """One game through Gymnasium's own wrappers, showing its pictures to `on_frame`."""
    kwargs: dict[str, Any] = {"disable_env_checker": True}
    if on_frame is not None:
        kwargs["render_mode"] = "rgb_array"
    image = is_atari(spec) and config.obs_type == "image"
    if is_atari(spec):
        kwargs |= {
            "repeat_action_probability": config.sticky_actions,
            "max_num_frames_per_episode": config.max_frames,
            "obs_type": "grayscale" if image else "ram",
        }
        kwargs["frameskip"] = _emulator_skip(config, spec)
    try:
        env: gym.Env[Any, Any] = gym.make(config.id, **kwargs)
        if on_frame is not None:
            env = _Shown(env, on_frame)
        if image:
            frame_skip = FRAME_SKIP if kwargs["frameskip"] == 1 else 1
            env = AtariPreprocessing(env, noop_max=config.noop_max, frame_skip=frame_skip)
    except (gym.error.Error, ImportError) as error:  # a package that the game needs, such as cv2, is missing
        raise UserError(f"cannot make {config.id}: {' '.join(str(error).split())}") from None
    return env


class _Shown(gym.Wrapper[Any, Any, Any, Any]):
    """Hands every rendered picture to a callback."""

    def __init__(self, env: gym.Env[Any, Any], on_frame: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        super().__init__(env)
        self._on_frame = on_frame

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset and show the first picture."""
        result = self.env.reset(**kwargs)
        self._show()
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and show what came of it."""
        result = self.env.step(action)
        self._show()
        return result

    def _show(self) -> None:
        picture = self.env.render()
        assert isinstance(picture, np.ndarray)
        self._on_frame(picture)


def _check_spaces(config: EnvConfig, envs: VectorEnv[Any, Any, Any]) -> None:
    actions, observations = envs.single_action_space, envs.single_observation_space
    shape = observations.shape or ()
    fits = isinstance(actions, gym.spaces.Discrete) and actions.n <= 256 and isinstance(observations, gym.spaces.Box)
    if not fits or not (len(shape) == 1 or shape[-2:] == (84, 84)):
        envs.close()
        raise UserError(
            f"{config.id} has observations {observations} and actions {actions}: an ALE game, or one with a vector "
            "of numbers and up to 256 discrete actions, is needed"
        )
