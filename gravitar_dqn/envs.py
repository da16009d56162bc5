"""Games as Gymnasium vector environments, and one more way to play a single game in colour for recordings.

All of them reset with autoreset NEXT_STEP: the step after a game's end plays no action, earns nothing and returns
the next game's first frame.

| game | vector environment | frame |
|---|---|---|
| `ALE/<Game>-v5`, images | ALE's own, in C++ | newest 84x84 frame, uint8 |
| older ALE ids (`Gravitar-v0`), images | Gymnasium's, around `AtariPreprocessing` | newest 84x84 frame, uint8 |
| `ALE/<Game>-v5`, RAM | `RamVectorEnv`, on threads | 128 bytes, uint8 |
| older ALE ids, RAM | Gymnasium's | 128 bytes, uint8 |
| any other with vector observations | Gymnasium's | the vector, float32 |
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import ale_py
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import AtariPreprocessing
from torch import Tensor

from gravitar_dqn.config import EnvSettings
from gravitar_dqn.errors import UserError
from gravitar_dqn.processes import available_cores
from gravitar_dqn.ram_envs import FRAME_SKIP, RAM_BYTES, RamVectorEnv

GymSpec = gym.envs.registration.EnvSpec  # Gymnasium's entry of a game
_MADE_FROM: weakref.WeakKeyDictionary[VectorEnv[Any, Any, Any], EnvSettings] = weakref.WeakKeyDictionary()
EMULATOR_FPS = 60
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before the first is made: no greeting


@dataclass(frozen=True)
class EnvSpec:
    """What agents know of their environments."""

    frame_shape: tuple[int, ...]  # of one observation without its stack: (84, 84) or (n,)
    frame_dtype: torch.dtype  # uint8 or float32
    num_actions: int
    frames_per_step: int = 1  # emulator frames; 1 where there is no emulator

    @property
    def kind(self) -> Literal["picture", "ram", "vector"]:
        """What a frame is: every network and every curiosity is made for one of these."""
        if len(self.frame_shape) == 2:
            return "picture"
        return "ram" if self.frame_shape == (RAM_BYTES,) and self.frame_dtype == torch.uint8 else "vector"

    @property
    def stack(self) -> int:
        """Frames in an observation: four pictures; RAM and what it was a step before; a vector alone."""
        return {"picture": 4, "ram": 2, "vector": 1}[self.kind]

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """(4, 84, 84), (2, 128) or (n,)."""
        return self.frame_shape if self.kind == "vector" else (self.stack, *self.frame_shape)

    @property
    def newest_shape(self) -> tuple[int, ...]:
        """The shape of one of `newest`'s: (1, 84, 84), (128,) or (n,)."""
        return (1, *self.frame_shape) if self.kind == "picture" else self.frame_shape

    def newest(self, obs: Tensor) -> Tensor:
        """The newest frames (N, *newest_shape) of observations (N, *obs_shape), which is all that curiosity sees."""
        return obs if self.kind == "vector" else obs[:, -1].view(-1, *self.newest_shape)


def spec_of(envs: VectorEnv[Any, Any, Any]) -> EnvSpec:
    """What agents know of these environments."""
    space = envs.single_observation_space
    shape = space.shape or ()
    shape = tuple(size for size in shape if size != 1) if len(shape) == 3 else shape
    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
    actions = int(envs.single_action_space.n)  # type: ignore[attr-defined]
    return EnvSpec(shape, dtype, actions, frames_per_step(config_of(envs)))


def frames_per_step(config: EnvSettings) -> int:
    """Emulator frames in an agent step; the mean where the oldest ids skip a random number."""
    spec = gym.registry.get(config.id)
    if spec is None or not is_atari(spec):
        return 1
    skip = _emulator_skip(config, spec)
    if isinstance(skip, tuple):
        return round(_mean(skip))
    return FRAME_SKIP if config.obs_type == "image" and skip == 1 else skip


def spec_of_game(config: EnvSettings) -> EnvSpec:
    """The same for environments that are not made yet."""
    envs = make_envs(replace(config, num_envs=1))
    spec = spec_of(envs)
    envs.close()
    return spec


def make_envs(config: EnvSettings) -> VectorEnv[Any, Any, Any]:
    """`config.num_envs` games side by side; UserError names an unknown game or one the agent cannot play."""
    spec = find_game(config)
    num_threads = min(config.num_threads or len(available_cores()), config.num_envs)
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
                [lambda: make_single(config)] * config.num_envs, autoreset_mode=AutoresetMode.NEXT_STEP
            )
    _check_spaces(config, envs)
    _MADE_FROM[envs] = config
    return envs


def config_of(envs: VectorEnv[Any, Any, Any]) -> EnvSettings:
    """What `make_envs` made these of. Of others only the id is known, from Gymnasium's entry, or the class's name."""
    if envs in _MADE_FROM:
        return _MADE_FROM[envs]
    spec = envs.spec or getattr(next(iter(getattr(envs, "envs", ())), None), "spec", None)
    return EnvSettings(id=spec.id if spec is not None else type(envs).__name__, num_envs=envs.num_envs)


def action_names(envs: SyncVectorEnv) -> list[str]:
    """What the game calls its actions; their numbers where it has no names."""
    meanings = getattr(envs.envs[0].unwrapped, "get_action_meanings", None)
    return list(meanings()) if meanings is not None else [str(i) for i in range(spec_of(envs).num_actions)]


def is_atari(spec: GymSpec) -> bool:
    """Whether the game runs in the Arcade Learning Environment."""
    return spec.entry_point == "ale_py.env:AtariEnv"


def make_recorded_env(
    config: EnvSettings, on_frame: Callable[[npt.NDArray[np.uint8]], None]
) -> tuple[SyncVectorEnv, float]:
    """One game that the agent sees as in `make_envs`, and the frames a second at which it plays in real speed.

    `on_frame` gets every picture in colour, (height, width, 3) uint8; for `ALE/` image games every emulator frame.
    """
    spec = find_game(config)
    if not is_atari(spec):
        # pygame, which draws CartPole and its like, looks for a desktop and a sound card also where only pictures are
        # asked for, and SDL below it complains on standard error where there are none. No window is opened here.
        for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):
            os.environ.setdefault(name, "dummy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        env = SyncVectorEnv([lambda: make_single(config, on_frame)], autoreset_mode=AutoresetMode.NEXT_STEP)
    if not is_atari(spec):
        return env, float(env.metadata.get("render_fps", 30))
    skip = _emulator_skip(config, spec)
    return env, EMULATOR_FPS / (_mean(skip) if isinstance(skip, tuple) else skip)


def _mean(skip: tuple[int, int]) -> float:
    """Of the random number of frames that the oldest ids skip: (2, 5) is 2 to 4."""
    return sum(range(*skip)) / len(range(*skip))


def find_game(config: EnvSettings) -> GymSpec:
    """Gymnasium's entry for the game; UserError names the nearest one where there is none."""
    try:
        return gym.spec(config.id)
    except gym.error.Error as error:
        full = f"ALE/{config.id}-v5"
        hint = f"did you mean {full}?" if full in gym.registry else " ".join(str(error).split())
        raise UserError(f"unknown game {config.id!r}: {hint}") from None


def _emulator_skip(config: EnvSettings, spec: GymSpec) -> int | tuple[int, int]:
    """Frames that the emulator itself skips: what the old ids say, else none for images (the wrapper skips)."""
    if spec.vector_entry_point is None:
        skip: int | tuple[int, int] = spec.kwargs["frameskip"]
        return skip
    return 1 if config.obs_type == "image" else FRAME_SKIP


def make_single(
    config: EnvSettings, on_frame: Callable[[npt.NDArray[np.uint8]], None] | None = None, **options: Any
) -> gym.Env[Any, Any]:
    """One game through Gymnasium's own wrappers, single frames, showing its pictures to `on_frame`.

    `options` are Gymnasium's, such as render_mode.
    """
    spec = find_game(config)
    kwargs: dict[str, Any] = {"disable_env_checker": True, **options}
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
        elif is_atari(spec):
            env = _NoopStart(env, config.noop_max // FRAME_SKIP)
    except (gym.error.Error, ImportError) as error:  # a package that the game needs, such as cv2, is missing
        raise UserError(f"cannot make {config.id}: {' '.join(str(error).split())}") from None
    return env


class _NoopStart(gym.Wrapper[Any, Any, Any, Any]):
    """Begins every game with up to so many steps that do nothing, as `RamVectorEnv` does."""

    def __init__(self, env: gym.Env[Any, Any], most: int) -> None:
        super().__init__(env)
        self._most = most

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset and do nothing for a while."""
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(0, self._most + 1)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:  # cut off by a small max_frames
                return self.env.reset()
        return obs, info


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


def _check_spaces(config: EnvSettings, envs: VectorEnv[Any, Any, Any]) -> None:
    actions, observations = envs.single_action_space, envs.single_observation_space
    shape = observations.shape or ()
    fits = isinstance(actions, gym.spaces.Discrete) and actions.n <= 256 and isinstance(observations, gym.spaces.Box)
    if not fits or not (len(shape) == 1 or shape[-2:] == (84, 84)):
        envs.close()
        raise UserError(
            f"{config.id} has observations {observations} and actions {actions}: an ALE game, or one with a vector "
            "of numbers and up to 256 discrete actions, is needed"
        )
