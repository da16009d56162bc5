"""The peers: the original notebook's way, written anew for its speed, and Stable-Baselines3 as its users make it."""

from __future__ import annotations

import collections
import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gravitar_dqn.benchmark.contenders import BATCH, GAME, NOTEBOOK_STEPS, NOTEBOOK_UPDATES, OLD_GAME, STEPS, UPDATES
from gravitar_dqn.config import PPORunConfig
from gravitar_dqn.runtime.execution import choose_device


def plain_trunk(channels: int) -> nn.Sequential:
    """The convolutions as PyTorch's tutorials write them."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
    )


class DuelingHead(nn.Module):
    """Q values (B, num_actions) of features (B, 3136)."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.advantage = nn.Sequential(
            nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, num_actions)
        )
        self.value = nn.Sequential(nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Q = V + A - mean(A)."""
        advantage = self.advantage(features)
        q_values: Tensor = self.value(features) + advantage - advantage.mean(dim=1, keepdim=True)
        return q_values


class Notebook:
    """The original notebook's way: one Gymnasium environment, a batch of one, whole stacks, ten updates an episode.

    Everything in fp32 and eager, with a bonus computed at every step, at the epsilon that most of its run has. The
    replay is shorter than the original's and the target network is never copied, neither of which costs it speed.
    """

    SIZE, EPSILON = 5_000, 0.02

    def __init__(self, device: str) -> None:
        self._device = choose_device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Gymnasium's word on the old id
            env = gym.make(OLD_GAME)
        env = gym.wrappers.AtariPreprocessing(env, frame_skip=1)
        self._env = gym.wrappers.FrameStackObservation(env, 4, padding_type="reset")
        here = self._device
        self._q = nn.Sequential(plain_trunk(4), DuelingHead(18)).to(here)
        self._q_target = copy.deepcopy(self._q)
        self._rnd_target = nn.Sequential(plain_trunk(4), nn.Linear(3136, 512), nn.ReLU()).to(here)
        self._predictor = nn.Sequential(
            plain_trunk(4), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)
        ).to(here)
        self._optimizer = torch.optim.Adam([*self._q.parameters(), *self._predictor.parameters()], lr=1e-4)
        self._states, self._next_states = (
            torch.zeros((self.SIZE, 4, 84, 84), dtype=torch.uint8, device=here) for _ in range(2)
        )
        self._actions = torch.zeros(self.SIZE, dtype=torch.int64, device=here)
        self._rewards, self._not_done = (torch.zeros(self.SIZE, device=here) for _ in range(2))
        self._stored = 0
        self._bonuses: collections.deque[float] = collections.deque(maxlen=1_000)
        self._random = np.random.default_rng(742)
        self._state = self._seen(self._env.reset(seed=742)[0])

    def _seen(self, obs: Any) -> Tensor:
        return torch.from_numpy(np.asarray(obs)).to(self._device)

    def play(self) -> int:
        """An episode's worth of steps and the ten updates that follow one."""
        for _ in range(NOTEBOOK_STEPS):
            self._step()
        for _ in range(NOTEBOOK_UPDATES):
            self._update()
        return NOTEBOOK_STEPS

    @torch.no_grad()
    def _step(self) -> None:
        if self._random.random() < self.EPSILON:
            action = int(self._env.action_space.sample())
        else:
            action = int(self._q(self._state[None].float() / 255).argmax())
        obs, reward, terminated, truncated, _ = self._env.step(action)
        next_state = self._seen(obs)
        error = self._rnd_target(next_state[None].float() / 255) - self._predictor(next_state[None].float())
        self._bonuses.append(float(0.5 * error.square().sum()))
        bonus = np.clip((self._bonuses[-1] - np.mean(self._bonuses)) / (np.std(self._bonuses) + 1e-8), -5, 5)
        at = self._stored % self.SIZE
        self._states[at], self._next_states[at], self._actions[at] = self._state, next_state, action
        self._rewards[at] = (float(bonus) + float(reward)) / 500
        self._not_done[at] = float(not (terminated or truncated))
        self._stored += 1
        self._state = self._seen(self._env.reset()[0]) if terminated or truncated else next_state

    def _update(self) -> None:
        rows = torch.randint(min(self._stored, self.SIZE), (BATCH,), device=self._device)
        states, next_states = self._states[rows], self._next_states[rows]
        with torch.no_grad():
            next_q = self._q_target(next_states.float() / 255).max(dim=1).values
        targets = self._rewards[rows] + 0.99 * next_q * self._not_done[rows]
        chosen = self._q(states.float() / 255).gather(1, self._actions[rows, None]).squeeze(1)
        with torch.no_grad():  # detached in the original
            error = self._predictor(next_states.float()) - self._rnd_target(next_states.float() / 255)
            mask = (torch.rand(BATCH, device=self._device) < 0.25).float()
            rnd_loss = (error.square().mean(dim=1) * mask).sum() / mask.sum().clamp(min=1)
        loss = F.smooth_l1_loss(chosen, targets) + rnd_loss
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


# ---------------------------------------------------------------- Stable-Baselines3


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
