"""Probe environments: each learnable only if one more part of the agent works, and each in seconds.

After rejax's idea: constant reward; reward tells the observation; delayed reward; the action matters; both.
"""

from itertools import islice
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.envs import make_envs, spec_of
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.loop import play


def spec_of_shape(obs_shape: tuple[int, ...], num_actions: int = 18) -> EnvSpec:
    """Of environments with pictures (4, 84, 84), RAM (2, 128) or vectors (n,)."""
    if len(obs_shape) == 1:
        return EnvSpec(obs_shape, torch.float32, num_actions)
    return EnvSpec(obs_shape[1:], torch.uint8, num_actions, frames_per_step=4)


class Probe(gym.Env[np.ndarray, int]):
    """A game of `length` steps with two actions and one number to see."""

    length = 1
    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        self.sign = 1.0 if self.np_random.random() < 0.5 else -1.0
        return self.see(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = self.reward(action)
        self.time += 1
        return self.see(), reward, self.time == self.length, False, {}

    def see(self) -> np.ndarray:
        return np.zeros(1, dtype=np.float32)

    def reward(self, action: int) -> float:
        return 1.0


class ConstantReward(Probe):
    """Value 1."""


class ObservedReward(Probe):
    """Value equals the observation."""

    def see(self) -> np.ndarray:
        return np.array([self.sign], dtype=np.float32)

    def reward(self, action: int) -> float:
        return self.sign


class DelayedReward(Probe):
    """Two steps, rewarded at the end: value gamma, then 1."""

    length = 2

    def see(self) -> np.ndarray:
        return np.array([float(self.time)], dtype=np.float32)

    def reward(self, action: int) -> float:
        return float(self.time)


class ActionMatters(Probe):
    """Action 1 earns 1, action 0 loses 1."""

    def reward(self, action: int) -> float:
        return 1.0 if action == 1 else -1.0


class Both(ObservedReward):
    """The action that matches the sign earns 1, the other loses 1."""

    def reward(self, action: int) -> float:
        return self.sign if action == 1 else -self.sign


class RamBoth(Both):
    """The same seen by RAM: byte 7 tells the sign, another one is noise."""

    observation_space = gym.spaces.Box(0, 255, (128,), np.uint8)

    def see(self) -> np.ndarray:
        ram = np.zeros(128, dtype=np.uint8)
        ram[7], ram[90] = 0x2C if self.sign > 0 else 0x24, self.np_random.integers(256)
        return ram


class TimeLimit(Probe):
    """Cut off after every step: a time-out, which bootstraps. Value 1 / (1 - gamma)."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.see(), 1.0, False, True, {}


class Remember(gym.Env[np.ndarray, int]):
    """Pictures: a bright or dark one, then two grey ones. At the third the action must match the first.

    Learnable only from a stack whose oldest frames are right, and that never reaches into the game before.
    """

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time, self.bright = 0, bool(self.np_random.random() < 0.5)
        return np.full((84, 84), 255 if self.bright else 60, dtype=np.uint8), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        done = self.time == 3
        reward = (1.0 if (action == 1) == self.bright else -1.0) if done else 0.0
        return np.full((84, 84), 128, dtype=np.uint8), reward, done, False, {}


def vector_of(env: type[gym.Env], num_envs: int) -> SyncVectorEnv:
    """`num_envs` copies with NEXT_STEP autoreset."""
    return SyncVectorEnv([env] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)


def check_overlap(config: DQNRunConfig, device: str, steps: int) -> DQNAgent:
    """Learn while the emulator plays; assert that exactly the frames it showed are stored, and return the agent."""
    envs = make_envs(config.env)
    agent = DQNAgent(config, spec_of(envs), torch.device(device))
    shown, recv = [], envs.recv

    def watched() -> Any:
        result = recv()
        shown.append(result[0].copy())
        return result

    envs.recv = watched
    for _ in islice(play(envs, agent, 1, overlap=True), steps):
        pass
    envs.close()
    num_envs = config.env.num_envs
    stored = agent.replay.frames[num_envs : num_envs * (steps + 1)]  # behind the first frames of all games
    assert np.array_equal(stored.cpu().numpy(), np.stack(shown).reshape(num_envs * steps, 84, 84))
    return agent
