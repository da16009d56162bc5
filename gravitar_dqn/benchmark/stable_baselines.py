"""Stable-Baselines3's DQN and PPO, as its users make them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch

from gravitar_dqn.benchmark.contenders import BATCH, GAME, STEPS, UPDATES
from gravitar_dqn.benchmark.notebook import DuelingHead, plain_trunk
from gravitar_dqn.config import PPORunConfig


def their_envs(num_envs: int) -> Any:
    """Stable-Baselines3's own vector environment, as its users make one."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    def preprocessed(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        return gym.wrappers.AtariPreprocessing(env, frame_skip=4, grayscale_newaxis=True)

    envs = make_vec_env(GAME, num_envs, seed=742, env_kwargs={"frameskip": 1}, wrapper_class=preprocessed)
    return VecFrameStack(envs, 4)


class StablePPO:
    """Stable-Baselines3's PPO: its Nature network, and our settings of games, rollout, epochs and minibatches."""

    def __init__(self, config: PPORunConfig) -> None:
        from stable_baselines3 import PPO

        settings = config.agent
        self._rollout = settings.num_steps * config.env.num_envs
        self._model = PPO(
            "CnnPolicy",
            their_envs(config.env.num_envs),
            learning_rate=settings.learning_rate,
            n_steps=settings.num_steps,
            batch_size=self._rollout // settings.num_minibatches,
            n_epochs=settings.update_epochs,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_coef,
            ent_coef=settings.ent_coef,
            max_grad_norm=settings.max_grad_norm,
            device=config.device,
            seed=742,
        )

    def play(self) -> int:
        """A rollout and what is learned from it."""
        before = self._model.num_timesteps
        self._model.learn(self._rollout, reset_num_timesteps=False)
        return int(self._model.num_timesteps - before)


class StableBaselines:
    """Stable-Baselines3's DQN, with its own vector environment and replay buffer, on the same network and batch."""

    NUM_ENVS = 8

    def __init__(self, device: str) -> None:
        from stable_baselines3 import DQN

        make: Any = DQN  # its own annotations do not allow for other layers inside
        self._model = make(
            "CnnPolicy",
            their_envs(self.NUM_ENVS),
            buffer_size=5_000,
            learning_starts=STEPS,
            batch_size=BATCH,
            train_freq=STEPS // self.NUM_ENVS,  # in steps of the vector environment
            gradient_steps=UPDATES,
            device=device,
            seed=742,
        )
        # Its own two networks, with the notebook's layers inside.
        for network in (self._model.q_net, self._model.q_net_target):
            network.features_extractor, network.q_net = plain_trunk(4), DuelingHead(18)
            network.to(self._model.device)
        self._model.q_net_target.load_state_dict(self._model.q_net.state_dict())
        self._model.policy.optimizer = torch.optim.Adam(self._model.q_net.parameters(), lr=1e-4)
        self._model.learn(2 * STEPS)

    def play(self) -> int:
        """As many steps as one round of updates belongs to."""
        before = self._model.num_timesteps
        self._model.learn(STEPS, reset_num_timesteps=False)
        return int(self._model.num_timesteps - before)
