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

import warnings
import weakref
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from gravitar_dqn.config import EnvSettings
from gravitar_dqn.envs.ram import RamVectorEnv
from gravitar_dqn.envs.single import make_single
from gravitar_dqn.envs.spec import FRAME_SKIP, EnvSpec, find_game, frames_per_step, is_atari
from gravitar_dqn.errors import UserError
from gravitar_dqn.runtime.processes import available_cores

_MADE_FROM: weakref.WeakKeyDictionary[VectorEnv[Any, Any, Any], EnvSettings] = weakref.WeakKeyDictionary()


def spec_of(envs: VectorEnv[Any, Any, Any]) -> EnvSpec:
    """What agents know of these environments."""
    space = envs.single_observation_space
    shape = space.shape or ()
    shape = tuple(size for size in shape if size != 1) if len(shape) == 3 else shape
    dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32
    actions = int(envs.single_action_space.n)  # type: ignore[attr-defined]
    return EnvSpec(shape, dtype, actions, frames_per_step(config_of(envs)))


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
