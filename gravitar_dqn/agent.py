"""The DQN agent: act, observe, update, and everything it must remember.

Nothing here reads a number back from the device but `metrics`, at a log tick.
The networks' work is in four functions, `_choose`, `_wonder`, `_learn` and `_distill`, that take and give nothing: they
work in place on tensors that stay where they are, so that a CUDA graph can hold each of them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from line_profiler import profile
from torch import Tensor, nn

from gravitar_dqn import returns
from gravitar_dqn.config import Config
from gravitar_dqn.envs import EnvSpec
from gravitar_dqn.execution import (
    choose_execution,
    choose_precision,
    prepare,
    prepare_optimizer,
    restore_generator,
    set_learning_rate,
)
from gravitar_dqn.networks import make_q_network
from gravitar_dqn.replay import Batch, Bools, ReplayBuffer
from gravitar_dqn.rnd import make_rnd
from gravitar_dqn.tracking import warn

Array = npt.NDArray[Any]


CLOCKS = ("global_step", "episodes", "num_updates")


class DQNAgent:
    """Dueling double DQN with n-step returns, proportional priorities and RND, each switchable by its setting.

    Args:
        config: the run's settings.
        spec: what the environments show and take.
        device: where networks, replay and all statistics live.
    """

    learns_while_playing = True
    metric_names: tuple[str, ...] = ("learning_rate",)

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        device: torch.device,
    ) -> None:
        settings, num_envs = config.agent, config.env.num_envs
        self.config, self.device = config, device
        self.replay = ReplayBuffer(
            settings.buffer_size,
            num_envs,
            spec.frame_shape,
            spec.frame_dtype,
            stack=spec.stack,
            n_step=settings.n_step,
            padding=config.stack_padding,
            priority_exponent=settings.priority_exponent,
            device=device,
        )
        self.q_network = make_q_network(spec.obs_shape, spec.num_actions, settings).to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.rnd = make_rnd(spec.obs_shape, num_envs, config.rnd)
        graphs = choose_execution(config.execution, device) == "graphs"
        adam: dict[str, Any] = {"eps": settings.adam_epsilon, "fused": True, "capturable": graphs}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), settings.learning_rate, **adam)
        self.rnd_optimizer: torch.optim.Adam | None = None
        if self.rnd is not None:
            self.rnd.to(device)
            self.rnd_optimizer = torch.optim.Adam(self.rnd.predictor.parameters(), config.rnd.learning_rate, **adam)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=choose_precision(config.precision, device) == "bf16"
        )
        self.messages: list[str] = []
        # What `_choose`, `_wonder`, `_learn` and `_distill` work on.
        self._obs = torch.zeros((num_envs, *self.replay.obs_shape), dtype=spec.frame_dtype, device=device)  # the newest
        self._actions = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._epsilons = torch.zeros(num_envs, device=device)
        self._played = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._bonus = torch.zeros(num_envs, device=device)
        self._loss_sums = torch.zeros(3, device=device)  # td_loss, q, gradient steps
        self._rnd_sums = torch.zeros(2, device=device)  # rnd_loss, gradient steps of the predictor
        self._int_sums = torch.zeros(2, device=device)  # bonus, steps played
        self._int_max = torch.full((), -torch.inf, device=device)
        # Every environment's last epsilon, on the host for what is told; a copy on the device acts.
        self._epsilon_ends = returns.epsilon_ladder(settings.epsilon_end, num_envs, settings.epsilon_ladder)
        self._epsilon_ends_here = self._epsilon_ends.to(device)
        self._epsilon_clock = -1  # of self._epsilons
        self._graphs = graphs
        self._capture()

        self.global_step = 0  # agent steps played, over all environments
        self.episodes = 0  # games finished
        self.num_updates = 0  # gradient steps
        self.batch_size = settings.batch_size
        self._next_train = settings.train_frequency  # clock of the next round of gradient steps
        self._next_sync = settings.target_network_frequency

    # ---------------------------------------------------------------- playing

    @property
    def clock(self) -> int:
        """Now, in the unit of `agent.clock`: agent steps or episodes."""
        return self.global_step if self.config.agent.clock == "steps" else self.episodes

    def _schedule(self, ends: Tensor) -> Tensor:
        settings = self.config.agent
        return returns.linear_schedule(settings.epsilon_start, ends, settings.epsilon_decay, self.clock)

    @property
    def policy(self) -> nn.Module:
        """The Q network that plays."""
        return self.target_network if self.config.agent.policy == "target" else self.q_network

    @property
    def epsilon(self) -> float:
        """Probability of a random action, averaged over the environments."""
        return float(self._schedule(self._epsilon_ends).mean())

    @property
    def filling(self) -> int | None:
        """Transitions stored while the replay buffer is not full yet; None from then on."""
        return None if self.replay.full else len(self.replay)

    def begin(self, obs: Array) -> None:
        """Start with the frames (num_envs, *frame_shape) of freshly reset environments."""
        self.replay.begin(obs)
        self.replay.latest(out=self._obs)

    @profile
    def act(self) -> Tensor:
        """Actions (num_envs,) int64 on the device for the newest observations, epsilon-greedy.

        The tensor holds them until the next call.
        """
        clock = min(self.clock, self.config.agent.epsilon_decay)  # the schedule stands still from then on
        if clock != self._epsilon_clock:
            self._epsilons.copy_(self._schedule(self._epsilon_ends_here))
            self._epsilon_clock = clock
        self.choose()
        return self._actions

    @torch.no_grad()
    def _choose(self) -> None:
        with self._autocast:
            q_values = self.policy(self._obs)
        self._actions.copy_(returns.epsilon_greedy(q_values, self._epsilons, self.generator))

    @profile
    def observe(
        self, actions: Tensor, rewards: Array, terminations: Bools, truncations: Bools, next_obs: Array, played: Bools
    ) -> None:
        """Take in one step of every environment; arrays as Gymnasium gives them.

        `played` (num_envs,) is false where the step was the dummy one after a game's end.
        """
        self.replay.put(actions, rewards, terminations, truncations, next_obs, played)
        self.replay.latest(out=self._obs)
        self.global_step += int(played.sum())
        self.episodes += int(((terminations | truncations) & played).sum())
        if self.rnd is not None:
            self._played.copy_(self.replay.last_played())
            self.wonder()
            self.replay.set_int_rewards(self._bonus)

    @torch.no_grad()
    def _wonder(self) -> None:
        assert self.rnd is not None
        with self._autocast:
            self._bonus.copy_(self.rnd.observe(self._obs, self._played))
        learned = self.rnd.learning_rewards(self._bonus) * self._played
        self._int_sums += torch.stack([learned.sum(), self._played.sum()])
        self._int_max.copy_(torch.maximum(self._int_max, learned.max()))

    # ---------------------------------------------------------------- learning

    def update(self) -> int:
        """Do the gradient steps that are due by the clock; gives their number."""
        settings = self.config.agent
        if len(self.replay) <= max(settings.learning_starts, settings.n_step * self.config.env.num_envs):
            self._next_train = self.clock + settings.train_frequency
            return 0
        done = 0
        self._set_learning_rate()
        while self.clock >= self._next_train:
            for _ in range(settings.gradient_steps):
                self.gradient_step()
            done += settings.gradient_steps
            self._next_train += settings.train_frequency
        frequency = settings.target_network_frequency
        if frequency > 0 and self.clock >= self._next_sync:
            self._update_target_network()
            self._next_sync = (self.clock // frequency + 1) * frequency
            self.messages.append("Matching network values")
        return done

    def _set_learning_rate(self) -> None:
        settings = self.config.agent
        if settings.learning_rate_decay > 0:
            done = min(self.global_step / settings.learning_rate_decay, 1.0)
            rate = settings.learning_rate + done * (settings.learning_rate_end - settings.learning_rate)
            set_learning_rate(self.optimizer, rate)

    @torch.no_grad()
    def _update_target_network(self) -> None:
        """theta' <- theta' + tau (theta - theta')."""
        ours: list[Tensor] = list(self.target_network.parameters())
        online: list[Tensor] = list(self.q_network.parameters())
        torch._foreach_lerp_(ours, online, self.config.agent.tau)

    def gradient_step(self) -> None:
        """One gradient step of the Q network, and one of the predictor's where it is due."""
        self.learn()
        self.num_updates += 1
        if self.rnd is not None and self.num_updates % self.config.rnd.update_frequency == 0:
            self.distill()

    @profile
    def _learn(self) -> None:
        """One gradient step of the Q network."""
        batch = self.replay.sample(self.config.agent.batch_size, self.generator)
        with self._autocast:
            loss, td_errors, q_mean = self._q_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.agent.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.q_network.parameters(), self.config.agent.max_grad_norm)
        self.optimizer.step()
        if self.config.agent.target_network_frequency == 0:
            self._update_target_network()
        self.replay.update_priorities(batch.rows, td_errors.abs() + 1e-6)
        self._loss_sums += torch.stack([loss.detach(), q_mean, torch.ones_like(q_mean)])

    @profile
    def _distill(self) -> None:
        """One gradient step of the predictor. The bonuses that come with it replace those stored."""
        assert self.rnd is not None and self.rnd_optimizer is not None
        batch = self.replay.sample(self.config.agent.batch_size, self.generator)
        with self._autocast:
            loss, bonus = self.rnd.loss(batch.next_obs, self.generator)
        if bonus is not None:  # the notebook's loss is detached: nothing learns from it
            self.replay.refresh_int_rewards(batch.last_rows, bonus)
            self.rnd_optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.rnd_optimizer.step()
        self._rnd_sums += torch.stack([loss.detach(), torch.ones_like(loss.detach())])

    def _capture(self) -> None:
        """Decide how the four functions run; with graphs, capture them anew."""
        settings, rnd = self.config.agent, self.config.rnd
        changes = settings.learning_rate_decay > 0
        prepare_optimizer(self.optimizer, settings.learning_rate, self._graphs, self.device, changes=changes)
        if self.rnd_optimizer is not None:
            prepare_optimizer(self.rnd_optimizer, rnd.learning_rate, self._graphs, self.device, changes=False)
        functions = (self._choose, self._wonder, self._learn, self._distill)
        self.choose, self.wonder, self.learn, self.distill = (
            prepare(function, self._graphs, self.generator, self.device, warn) for function in functions
        )

    def _q_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, TD errors (B,) and mean Q of a batch."""
        settings = self.config.agent
        rewards = settings.reward_scale * batch.rewards
        if self.rnd is not None:
            rewards = rewards + self.config.rnd.coef * self.rnd.learning_rewards(batch.int_rewards)
        # Before the passes without gradient: autocast caches weights it has cast, in some versions without theirs.
        q_values = self.q_network(batch.obs)
        with torch.no_grad():
            next_q = self.target_network(batch.next_obs)
            next_q_online = self.q_network(batch.next_obs) if settings.double_q else None
            terminated = batch.terminated | batch.truncated if settings.time_limit_is_terminal else batch.terminated
            targets = returns.td_targets(
                returns.n_step_returns(rewards, settings.gamma),
                batch.steps,
                terminated,
                next_q,
                settings.gamma,
                next_q_online,
            )
            weights = torch.ones_like(targets)
            if settings.priority_exponent > 0:
                weights = returns.importance_weights(batch.probabilities, settings.importance_exponent)
        loss, td_errors = returns.td_loss(q_values, batch.actions, targets, weights)
        return loss, td_errors, q_values.detach().mean()

    # ---------------------------------------------------------------- telling and keeping

    def metrics(self) -> dict[str, float]:
        """Means since the last call, NaN where nothing happened, and the present epsilon and buffer fill."""
        # This is a CPU-GPU sync point.
        sums = torch.cat([self._loss_sums, self._rnd_sums, self._int_sums, self._int_max[None]])
        td_loss, q_mean, updates, rnd_loss, rnd_updates, bonus, played, int_max = sums.tolist()
        for tensor in (self._loss_sums, self._rnd_sums, self._int_sums):
            tensor.zero_()
        self._int_max.fill_(-torch.inf)
        nan = float("nan")
        return {
            "int_reward_mean": bonus / played if played else nan,
            "epsilon": self.epsilon,
            "td_loss": td_loss / updates if updates else nan,
            "rnd_loss": rnd_loss / rnd_updates if rnd_updates else nan,
            "q_mean": q_mean / updates if updates else nan,
            "buffer_fill": self.replay.fill,
            "int_reward_max": int_max if np.isfinite(int_max) else nan,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }

    def policy_state(self) -> dict[str, Any]:
        """Weights of the network that plays, for recordings."""
        return self.policy.state_dict()

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """All that learning depends on; the replay buffer only where asked for."""
        return {
            "policy": self.policy_state(),  # one of the next two; torch stores it once
            "q_network": self.q_network.state_dict(),
            "target_network": self.target_network.state_dict(),
            "rnd": None if self.rnd is None else self.rnd.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rnd_optimizer": None if self.rnd_optimizer is None else self.rnd_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "clocks": {name: getattr(self, name) for name in CLOCKS},
            "next_train": self._next_train,
            "next_sync": self._next_sync,
            "replay": self.replay.state_dict() if replay else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Then call `begin`. Without a replay buffer, learning waits until
        `learning_starts` transitions are stored anew."""
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        if self.rnd is not None:
            self.rnd.load_state_dict(state["rnd"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.rnd_optimizer is not None:
            self.rnd_optimizer.load_state_dict(state["rnd_optimizer"])
        restore_generator(self.generator, state["generator"], self.config.seed + state["clocks"]["global_step"])
        for name in CLOCKS:
            setattr(self, name, int(state["clocks"][name]))
        self._next_train, self._next_sync = state["next_train"], state["next_sync"]
        if state["replay"] is not None:
            self.replay.load_state_dict(state["replay"])
        self._epsilon_clock = -1
        self._capture()  # the optimizers have new tensors
