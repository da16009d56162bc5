"""What the benchmark lets play: our training as a whole, and the bounds of it, each part alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gravitar_dqn import training
from gravitar_dqn.config import (
    DQNRunConfig,
    DQNSettings,
    EnvSettings,
    PPORNDSettings,
    PPORunConfig,
    RNDSettings,
    RunConfig,
    TaskSettings,
    validate,
)
from gravitar_dqn.envs import make_envs
from gravitar_dqn.loop import can_overlap, play
from gravitar_dqn.presets import PUBLISHED_PPO
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import Graphed

GAME, OLD_GAME = "ALE/Gravitar-v5", "Gravitar-v0"
BATCH = 128
# 1.4 samples learned for each step played, exactly, for everyone.
STEPS, UPDATES = 640, 7
NOTEBOOK_STEPS, NOTEBOOK_UPDATES = 914, 10  # ten updates an episode, of which this is the usual length


def our_config(
    device: str,
    num_envs: int,
    *,
    plain: bool = False,
    curious: bool = True,
    max_grad_norm: float = 0.0,
    fast: bool = True,
) -> DQNRunConfig:
    """The `gravitar` preset with UPDATES gradient steps every STEPS steps; UserError where that cannot be.

    `plain`: the notebook's network and targets instead of ours, and `max_grad_norm`. `fast` off: eager fp32.
    """
    size = max(20_000, 16 * num_envs)
    agent = DQNSettings(buffer_size=size, learning_starts=2_000, train_frequency=STEPS, gradient_steps=UPDATES)
    if plain:
        agent = replace(
            agent,
            network="notebook",
            policy="online",
            target_network_frequency=16_000,
            tau=1.0,
            double_q=False,
            n_step=1,
            max_grad_norm=max_grad_norm,
        )
    # Curiosity from the first gradient steps on, as in any run but the beginning of one.
    rnd = RNDSettings(coef=0.1, init_updates=1) if curious else RNDSettings(coef=0.0)
    config = DQNRunConfig(env=EnvSettings(id=GAME, num_envs=num_envs), agent=agent, rnd=rnd, device=device)
    if not fast:
        config = replace(config, precision="fp32", execution="eager")
    validate(config)
    return config


def actor_critic_config(device: str, *, curious: bool = True, tasks: bool = True) -> PPORunConfig:
    """RANDAL with the published settings and a short random start; without `tasks` and `curious` it is plain PPO."""
    config = PPORunConfig(env=EnvSettings(id=GAME, num_envs=32), agent=PUBLISHED_PPO, device=device)
    rnd = PPORNDSettings(coef=1.0 if curious else 0.0, init_steps=30, init_updates=0)
    weight = 1.0 if tasks else 0.0
    return replace(config, rnd=rnd, tasks=TaskSettings(weight, weight, weight))


class Ours:
    """Our loop, without logs, films and checkpoints."""

    def __init__(self, config: RunConfig) -> None:
        envs, self.agent = training.build(config)
        overlap = can_overlap(envs, self.agent)
        self._loop = play(envs, self.agent, distributed.share_of(config).seed, overlap=overlap)
        while self.agent.num_updates <= Graphed.WARM_UP:  # of the hot functions, then the most are captured
            next(self._loop)

    def play(self) -> int:
        """Until it has learned again."""
        steps, updates = self.agent.global_step, self.agent.num_updates
        while self.agent.num_updates == updates:
            next(self._loop)
        return self.agent.global_step - steps


class NetworksAlone:
    """All the networks' work of `Ours`, without emulator or storing: what the arithmetic costs."""

    def __init__(self, config: DQNRunConfig) -> None:
        self._agent: Any = Ours(config).agent  # a DQNAgent
        self._debt = 0.0  # gradient steps owed

    def play(self) -> int:
        """The work that belongs to STEPS steps, or to one step of all environments."""
        settings, num_envs = self._agent.config.agent, self._agent.config.env.num_envs
        vector_steps = max(STEPS // num_envs, 1)
        for _ in range(vector_steps):
            self._agent.act()
            if self._agent.rnd is not None:
                self._agent.compute_int_rewards()
        steps: int = vector_steps * num_envs
        self._debt += steps * settings.gradient_steps / settings.train_frequency
        while self._debt >= 1:
            self._agent.gradient_step()
            self._debt -= 1
        return steps


class BareEmulator:
    """Random actions, nothing learned."""

    def __init__(self, config: DQNRunConfig) -> None:
        self._envs = make_envs(config.env)
        self._envs.reset(seed=config.seed)
        self._actions = np.random.default_rng(config.seed).integers(0, 18, (64, config.env.num_envs))

    def play(self) -> int:
        """64 steps of all environments."""
        for actions in self._actions:
            self._envs.step(actions)
        return int(self._actions.size)
