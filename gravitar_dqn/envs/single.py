"""One game at a time, through Gymnasium's own wrappers: for recordings, for `load_agent`, and for older ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import AtariPreprocessing

from gravitar_dqn.config import EnvSettings
from gravitar_dqn.envs.spec import FRAME_SKIP, emulator_skip, find_game, is_atari, mean_skip
from gravitar_dqn.errors import UserError

EMULATOR_FPS = 60


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
        kwargs["frameskip"] = emulator_skip(config, spec)
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
    skip = emulator_skip(config, spec)
    return env, EMULATOR_FPS / (mean_skip(skip) if isinstance(skip, tuple) else skip)


def action_names(envs: SyncVectorEnv) -> list[str]:
    """What the game calls its actions; their numbers where it has no names."""
    meanings = getattr(envs.envs[0].unwrapped, "get_action_meanings", None)
    if meanings is not None:
        return list(meanings())
    return [str(i) for i in range(envs.single_action_space.n)]  # type: ignore[attr-defined]


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
