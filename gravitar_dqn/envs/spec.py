"""What is known of a game before and while it is played: Gymnasium's entry, frames, actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ale_py
import gymnasium as gym
import torch
from torch import Tensor

from gravitar_dqn.config import EnvSettings
from gravitar_dqn.errors import UserError

GymSpec = gym.envs.registration.EnvSpec  # Gymnasium's entry of a game
FRAME_SKIP = 4  # emulator frames in an agent step
RAM_BYTES = 128
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


def find_game(config: EnvSettings) -> GymSpec:
    """Gymnasium's entry for the game; UserError names the nearest one where there is none."""
    try:
        return gym.spec(config.id)
    except gym.error.Error as error:
        full = f"ALE/{config.id}-v5"
        hint = f"did you mean {full}?" if full in gym.registry else " ".join(str(error).split())
        raise UserError(f"unknown game {config.id!r}: {hint}") from None


def is_atari(spec: GymSpec) -> bool:
    """Whether the game runs in the Arcade Learning Environment."""
    return spec.entry_point == "ale_py.env:AtariEnv"


def frames_per_step(config: EnvSettings) -> int:
    """Emulator frames in an agent step; the mean where the oldest ids skip a random number."""
    spec = gym.registry.get(config.id)
    if spec is None or not is_atari(spec):
        return 1
    skip = emulator_skip(config, spec)
    if isinstance(skip, tuple):
        return round(mean_skip(skip))
    return FRAME_SKIP if config.obs_type == "image" and skip == 1 else skip


def emulator_skip(config: EnvSettings, spec: GymSpec) -> int | tuple[int, int]:
    """Frames that the emulator itself skips: what the old ids say, else none for images (the wrapper skips)."""
    if spec.vector_entry_point is None:
        skip: int | tuple[int, int] = spec.kwargs["frameskip"]
        return skip
    return 1 if config.obs_type == "image" else FRAME_SKIP


def mean_skip(skip: tuple[int, int]) -> float:
    """Of the random number of frames that the oldest ids skip: (2, 5) is 2 to 4."""
    return sum(range(*skip)) / len(range(*skip))
