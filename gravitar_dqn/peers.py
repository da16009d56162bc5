"""What the benchmark lets play against each other: ourselves, the notebook's way, Stable-Baselines3, and the bounds.

Each lives in a process of its own, so that threads, allocator and caches of one do not touch another, and plays only
when it is its turn.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gravitar_dqn import envs as games
from gravitar_dqn import training
from gravitar_dqn.config import (
    NO_TASKS,
    Config,
    DQNConfig,
    EnvConfig,
    PPORNDConfig,
    RANDALConfig,
    RNDConfig,
    RunConfig,
    UserError,
    get_preset,
    validate,
)
from gravitar_dqn.execution import choose_device

GAME, OLD_GAME = "ALE/Gravitar-v5", "Gravitar-v0"
BATCH = 128
# 1.4 samples learned for each step played, exactly, for everyone.
STEPS, UPDATES = 640, 7
NOTEBOOK_STEPS, NOTEBOOK_UPDATES = 914, 10  # ten updates an episode, of which this is the usual length


@dataclass(frozen=True)
class Turn:
    """What a contender did when it was its turn."""

    steps: int  # agent steps played
    seconds: float

    @property
    def speed(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds


class Contender(Protocol):
    """Something that plays and learns."""

    def play(self) -> int:
        """A short stretch of training; gives the agent steps played."""


def our_config(
    device: str,
    num_envs: int,
    *,
    plain: bool = False,
    curious: bool = True,
    updates: int = UPDATES,
    max_grad_norm: float = 0.0,
    fast: bool = True,
) -> Config:
    """The `gravitar` preset with so many updates every STEPS steps; UserError where that cannot be.

    `plain`: the notebook's network and targets instead of ours, and `max_grad_norm`. `fast` off: eager fp32.
    """
    size = max(20_000, 16 * num_envs)
    agent = DQNConfig(buffer_size=size, learning_starts=2_000, train_frequency=STEPS, gradient_steps=updates)
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
    rnd = RNDConfig(coef=0.1, init_updates=1) if curious else RNDConfig(coef=0.0)
    config = Config(env=EnvConfig(id=GAME, num_envs=num_envs), agent=agent, rnd=rnd, device=device)
    if not fast:
        config = replace(config, precision="fp32", execution="eager")
    validate(config)
    return config


def actor_critic_config(device: str, *, curious: bool = True, tasks: bool = True) -> RANDALConfig:
    """The preset `randal` with a short random start; without `tasks` and `curious` it is plain PPO."""
    config = get_preset("randal")
    assert isinstance(config, RANDALConfig)
    rnd = replace(config.rnd, init_steps=30) if curious else PPORNDConfig(coef=0.0)
    return replace(config, rnd=rnd, tasks=config.tasks if tasks else NO_TASKS, device=device)


class Ours:
    """Our loop, without anything that only tells."""

    def __init__(self, config: RunConfig) -> None:
        envs, self.agent = training.build(config)
        overlap = training.can_overlap(envs, self.agent)
        self._loop = training.play(envs, self.agent, config.seed, overlap=overlap)
        if isinstance(config, RANDALConfig):
            self._vector_steps, updates = config.agent.num_steps, 1
        else:
            assert isinstance(config, Config)
            self._vector_steps, updates = max(STEPS // config.env.num_envs, 1), 2 * config.agent.gradient_steps
        while self.agent.num_updates < updates:
            next(self._loop)

    def play(self) -> int:
        """As many steps as one round of updates belongs to, or one step of all environments."""
        before = self.agent.global_step
        for _ in islice(self._loop, self._vector_steps):
            pass
        return self.agent.global_step - before


class NetworksAlone:
    """All the networks' work of `Ours`, without emulator or storing: what the arithmetic costs."""

    def __init__(self, config: Config) -> None:
        self._agent: Any = Ours(config).agent
        self._debt = 0.0  # gradient steps owed

    def play(self) -> int:
        """The work that belongs to STEPS steps, or to one step of all environments."""
        settings, num_envs = self._agent.config.agent, self._agent.config.env.num_envs
        vector_steps = max(STEPS // num_envs, 1)
        for _ in range(vector_steps):
            self._agent.act()
            if self._agent.rnd is not None:
                self._agent.wonder()
        steps: int = vector_steps * num_envs
        self._debt += steps * settings.gradient_steps / settings.train_frequency
        while self._debt >= 1:
            self._agent.gradient_step()
            self._debt -= 1
        return steps


class BareEmulator:
    """Random actions, nothing learned."""

    def __init__(self, config: Config) -> None:
        self._envs = games.make_envs(config.env)
        self._envs.reset(seed=config.seed)
        self._actions = np.random.default_rng(config.seed).integers(0, 18, (64, config.env.num_envs))

    def play(self) -> int:
        """64 steps of all environments."""
        for actions in self._actions:
            self._envs.step(actions)
        return int(self._actions.size)


# ---------------------------------------------------------------------------------------------- the notebook's way


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


# ---------------------------------------------------------------------------------------------- Stable-Baselines3


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

    def __init__(self, config: RANDALConfig) -> None:
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


# ---------------------------------------------------------------------------------------------- taking turns


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, make: Callable[..., Contender], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready; UserError with its complaint when it could not be made."""
        self._receive()

    def turn(self, seconds: float) -> Turn:
        """Let it play for about this long."""
        self._connection.send(seconds)
        return cast(Turn, self._receive())

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError(f"{self.name} ended unexpectedly") from None
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        """End its process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Any, make: Callable[..., Contender], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what it tells is for somebody who trains
                contender = make(*arguments)
                contender.play()  # warm up
            connection.send(None)
            while True:
                connection.send(_play_for(contender, connection.recv()))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def _play_for(contender: Contender, seconds: float) -> Turn:
    steps, start = 0, time.perf_counter()
    while True:
        steps += contender.play()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = time.perf_counter() - start
        if passed >= seconds:
            return Turn(steps, passed)


@contextlib.contextmanager
def workers(makers: dict[str, tuple[Any, ...]]) -> Iterator[list[Worker]]:
    """A ready worker for each name. All are ended at the end."""
    with contextlib.ExitStack() as closing:
        made = []
        for name, (make, *arguments) in makers.items():
            made.append(Worker(name, make, *arguments))
            closing.callback(made[-1].close)
            made[-1].wait()  # all at once they would only get in each other's way
        yield made
