"""What the tests of PPO, of its tasks and of RANDAL share: small runs, and agents that have played a little."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import probes
import torch

from gravitar_dqn.agents.auxiliary_tasks import TASKS, AuxiliaryTasks, make_task_heads, task_weights
from gravitar_dqn.agents.ppo import PPOAgent
from gravitar_dqn.config import EnvSettings, PPORNDSettings, PPORunConfig, TaskSettings
from gravitar_dqn.envs import spec_of
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.loop import play
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.presets import NO_TASKS, PUBLISHED_PPO
from gravitar_dqn.replay import ReplayBuffer
from gravitar_dqn.runtime.execution import choose_device

PPO_RND = NO_TASKS
WEIGHTS = {"reward_prediction": 1.0, "value_replay": 1.0}
VECTOR_TASKS = TaskSettings(pixel_control=0.0, **WEIGHTS, replay_length=200, window=3, num_windows=8, reward_batch=32)
PICTURE_TASKS = TaskSettings(pixel_control=1.0, **WEIGHTS, replay_length=60, window=3, num_windows=4, reward_batch=32)


def settings(tasks: TaskSettings = PPO_RND, *, num_envs: int = 8, rnd: float = 0.1, **changes: Any) -> PPORunConfig:
    """A small, quick learner; `changes` go to its PPOSettings."""
    agent = replace(
        PUBLISHED_PPO, num_steps=16, learning_rate=3e-3, gamma=0.5, clip_coef=0.2, ext_coef=1.0, clip_rewards=False
    )
    return PPORunConfig(
        env=EnvSettings(num_envs=num_envs),
        agent=replace(agent, **changes),
        rnd=PPORNDSettings(coef=rnd, init_steps=5, init_updates=0),
        tasks=tasks,
        precision="fp32",
        device="cpu",
        seed=1,
    )


def build(config: PPORunConfig, probe: type) -> tuple[Any, PPOAgent]:
    """Probe environments and a new agent for them."""
    torch.manual_seed(config.seed)
    envs = probes.vector_of(probe, config.env.num_envs)
    return envs, PPOAgent(config, spec_of(envs), choose_device(config.device))


def learn(config: PPORunConfig, probe: type, steps: int) -> PPOAgent:
    """An agent that has played so many steps of the vector environment."""
    envs, agent = build(config, probe)
    for _ in islice(play(envs, agent, config.seed), steps):
        pass
    return agent


def ring_of(
    frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ends: np.ndarray | None = None, **options: Any
) -> ReplayBuffer:
    """A ring that holds this history: frames (T + 1, B, ...), the rest (T, B). After an end comes a dummy step."""
    steps, num_envs = rewards.shape
    dtype = torch.uint8 if frames.dtype == np.uint8 else torch.float32
    ring = ReplayBuffer(steps * num_envs, num_envs, frames.shape[2:], dtype, **options)
    ring.begin(frames[0])
    played, no = np.ones(num_envs, dtype=bool), np.zeros(num_envs, dtype=bool)
    for t in range(steps):
        ended = ends[t] & played if ends is not None else no
        ring.put(torch.from_numpy(actions[t]), rewards[t], ended, no, frames[t + 1], played)
        played = ~ended
    return ring


def task_alone(name: str, ring: ReplayBuffer, policy: ActorCritic, **changes: Any) -> AuxiliaryTasks:
    """One task, of weight 1, that learns from a ring; `changes` go to its TaskSettings."""
    weights = {task: float(task == name) for task in TASKS}
    config = settings(replace(PICTURE_TASKS, **weights, **changes))
    spec = EnvSpec(ring.frame_shape, ring.frames.dtype, policy.policy[0].out_features)
    heads = make_task_heads(task_weights(config.tasks), spec, policy.dense_size)
    return AuxiliaryTasks(config, policy, heads, ring, torch.Generator().manual_seed(0))
