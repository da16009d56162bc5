"""DQN: dueling double Q-learning with n-step returns, an averaged target, priorities and RND, each by its setting."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from line_profiler import profile
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.agents.base import Agent, AgentEntry, Array, Insight, Look, Means, Stateful
from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import make_q_network
from gravitar_dqn.replay import Batch, Bools, ReplayBuffer
from gravitar_dqn.rnd import make_rnd
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import prepare_optimizer, set_learning_rate
from gravitar_dqn.runtime.memory import check_buffer_fits


class DQNAgent(Agent):
    """The agent.

    Args:
        config: the run's settings.
        spec: what the environments show and take.
        device: where networks, replay and all statistics live.
    """

    config: DQNRunConfig
    learns_while_playing = True

    def __init__(self, config: DQNRunConfig, spec: EnvSpec, device: torch.device) -> None:
        settings, num_envs = config.agent, config.env.num_envs
        check_buffer_fits(settings.buffer_size, spec.frame_shape, spec.frame_dtype, device)
        replay = ReplayBuffer(
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
        super().__init__(config, spec, device, replay)
        self.batch_size = settings.batch_size
        self.q_network = make_q_network(spec, settings).to(device)
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)
        self.rnd = make_rnd(spec, num_envs, config.rnd)
        adam: dict[str, Any] = {"eps": settings.adam_epsilon, "fused": True, "capturable": self._graphs}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), settings.learning_rate, **adam)
        self.rnd_optimizer: torch.optim.Adam | None = None
        self._q_means = Means(("td_loss", "q_mean"), device)
        self._rnd_means = Means(("rnd_loss",), device)
        self._int_means = Means(("int_reward_mean",), device, largest="int_reward_max")
        self._means = [self._q_means]
        if self.rnd is not None:
            self.rnd.to(device)
            self.rnd_optimizer = torch.optim.Adam(self.rnd.predictor.parameters(), config.rnd.learning_rate, **adam)
            self._means += [self._rnd_means, self._int_means]
        # What the captured functions work on.
        self._epsilons = torch.zeros(num_envs, device=device)
        self._played = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._bonus = torch.zeros(num_envs, device=device)
        # Every environment's last epsilon, on the host for the console; a copy of this rank's on the device acts.
        all_envs = num_envs * distributed.size()
        self._epsilon_ends = losses.epsilon_ladder(settings.epsilon_end, all_envs, settings.epsilon_ladder)
        self._epsilon_ends_here = distributed.own_part(self._epsilon_ends).to(device)
        self._next_train = settings.train_frequency  # clock of the next round of gradient steps
        self._next_sync = settings.target_network_frequency
        self._epsilon_clock = -1  # of self._epsilons: never yet
        self._fill_before = 0.0  # of the replay buffer, when the checkpoint that was loaded was written
        self._capture()

    # ---------------------------------------------------------------- playing

    @property
    def clock(self) -> int:
        """Now, in the unit of `agent.clock`: agent steps or episodes."""
        return self.episodes if self.config.counts_episodes else self.global_step

    def _schedule(self, ends: Tensor) -> Tensor:
        settings = self.config.agent
        return losses.linear_schedule(settings.epsilon_start, ends, settings.epsilon_decay, self.clock)

    @property
    def policy(self) -> nn.Module:
        """The Q network that plays."""
        return self.target_network if self.config.agent.policy == "target" else self.q_network

    @property
    def epsilon(self) -> float:
        """Probability of a random action, averaged over the environments."""
        return float(self._schedule(self._epsilon_ends).mean())

    @profile
    def act(self) -> Tensor:
        """Actions (num_envs,) int64 on the device for the newest observations, epsilon-greedy.

        The tensor holds them until the next call.
        """
        clock = min(self.clock, self.config.agent.epsilon_decay)  # the schedule stands still from then on
        if clock != self._epsilon_clock:
            self._epsilons.copy_(self._schedule(self._epsilon_ends_here))
            self._epsilon_clock = clock
        self.select_actions()
        return self._actions

    @torch.no_grad()
    def _select_actions(self) -> None:
        with self._autocast:
            q_values = self.policy(self._obs)
        self._actions.copy_(losses.epsilon_greedy(q_values, self._epsilons, self.generator))

    def observe(
        self, actions: Tensor, rewards: Array, terminations: Bools, truncations: Bools, next_obs: Array, played: Bools
    ) -> None:
        """Take in one step of every environment, and its curiosity bonus."""
        super().observe(actions, rewards, terminations, truncations, next_obs, played)
        if self.rnd is not None:
            self._played.copy_(self.replay.last_played())
            self.compute_int_rewards()
            self.replay.set_int_rewards(self._bonus)

    @torch.no_grad()
    def _compute_int_rewards(self) -> None:
        assert self.rnd is not None
        with self._autocast:
            self._bonus.copy_(self.rnd.step_bonus(self._obs, self._played))
        learned = self.rnd.learning_rewards(self._bonus) * self._played
        self._int_means.add({"int_reward_mean": learned.sum(), "int_reward_max": learned.max()}, self._played.sum())

    # ---------------------------------------------------------------- learning

    def update(self) -> int:
        """Do the gradient steps that are due by the clock; returns their number."""
        settings = self.config.agent
        # After a resume the buffer first holds the newest games alone: learning from those undoes what was learned.
        if self.stored <= self.config.first_update or self.replay.fill < self._fill_before:
            self._next_train = self.clock + settings.train_frequency
            return 0
        done = 0
        if settings.learning_rate_decay > 0:
            set_learning_rate(self.optimizer, self._scheduled_learning_rate(settings))
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

    @torch.no_grad()
    def _update_target_network(self) -> None:
        """theta' <- theta' + tau (theta - theta')."""
        ours: list[Tensor] = list(self.target_network.parameters())
        online: list[Tensor] = list(self.q_network.parameters())
        torch._foreach_lerp_(ours, online, self.config.agent.tau)

    def gradient_step(self) -> None:
        """One gradient step of the Q network, and one of the predictor's where it is due."""
        self.update_q_network()
        self.num_updates += 1
        if self.rnd is not None and self.num_updates % self.config.rnd.update_frequency == 0:
            self.update_predictor()

    @profile
    def _update_q_network(self) -> None:
        batch = self.replay.sample(self.config.agent.batch_size, self.generator)
        with self._autocast:
            loss, td_errors, q_mean = self._q_loss(batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        distributed.average_gradients(self.q_network.parameters())
        if self.config.agent.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.q_network.parameters(), self.config.agent.max_grad_norm)
        self.optimizer.step()
        if self.config.agent.target_network_frequency == 0:
            self._update_target_network()
        self.replay.update_priorities(batch.indices, td_errors.abs() + 1e-6)
        self._q_means.add({"td_loss": loss, "q_mean": q_mean})

    @profile
    def _update_predictor(self) -> None:
        """One gradient step of the predictor. The bonuses that come with it replace those stored."""
        assert self.rnd is not None and self.rnd_optimizer is not None
        batch = self.replay.sample(self.config.agent.batch_size, self.generator)
        with self._autocast:
            loss, bonus = self.rnd.loss(batch.next_obs, self.generator)
        if bonus is not None:  # the notebook's loss is detached: nothing learns from it
            self.replay.refresh_int_rewards(batch.last_indices, bonus)
            self.rnd_optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            distributed.average_gradients(self.rnd.predictor.parameters())
            self.rnd_optimizer.step()
        self._rnd_means.add({"rnd_loss": loss})

    def _capture(self) -> None:
        settings, rnd = self.config.agent, self.config.rnd
        changes = settings.learning_rate_decay > 0
        learning_rate = self._scheduled_learning_rate(settings)
        prepare_optimizer(self.optimizer, learning_rate, self._graphs, self.device, changes=changes)
        if self.rnd_optimizer is not None:
            prepare_optimizer(self.rnd_optimizer, rnd.learning_rate, self._graphs, self.device, changes=False)
        self._epsilon_clock = -1  # also after a resume
        self.select_actions, self.compute_int_rewards, self.update_q_network, self.update_predictor = self._prepared(
            self._select_actions, self._compute_int_rewards, self._update_q_network, self._update_predictor
        )

    def _q_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, TD errors (B,) and mean Q of a batch."""
        settings = self.config.agent
        # Before the passes without gradient: autocast caches weights it has cast, in some versions without theirs.
        q_values = self.q_network(batch.obs)
        targets = self._targets(batch)
        weights = torch.ones_like(targets)
        if settings.priority_exponent > 0:
            weights = losses.importance_weights(batch.probabilities, settings.importance_exponent, distributed.largest)
        loss, td_errors = losses.td_loss(q_values, batch.actions, targets, weights)
        return loss, td_errors, q_values.detach().mean()

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Tensor:
        """What the chosen actions' values shall be (B,): score and bonus of n steps, and the bootstrap."""
        settings = self.config.agent
        rewards = settings.reward_scale * batch.rewards
        if self.rnd is not None:
            rewards = rewards + self.config.rnd.coef * self.rnd.learning_rewards(batch.int_rewards)
        returns = losses.n_step_returns(rewards, settings.gamma)
        next_q = self.target_network(batch.next_obs)
        next_q_online = self.q_network(batch.next_obs) if settings.double_q else None
        terminated = batch.terminated | batch.truncated if settings.time_limit_is_terminal else batch.terminated
        return losses.td_targets(returns, batch.steps, terminated, next_q, settings.gamma, next_q_online)

    # ---------------------------------------------------------------- metrics and state

    def _present_metrics(self) -> dict[str, float]:
        return {**super()._present_metrics(), "epsilon": self.epsilon}

    def _parts(self) -> dict[str, Stateful | None]:
        return {
            "q_network": self.q_network,
            "target_network": self.target_network,
            "rnd": self.rnd,
            "optimizer": self.optimizer,
            "rnd_optimizer": self.rnd_optimizer,
        }

    def _counters(self) -> tuple[str, ...]:
        return ("next_train", "next_sync")

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """All that learning depends on; the replay buffer only where asked for."""
        fill = max(self.replay.fill, self._fill_before)  # also of one that is not as full again yet
        return {**super().state_dict(replay=replay), "fill": fill}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. Learning waits until the replay buffer is as full as it was."""
        super().load_state_dict(state)
        self._fill_before = state.get("fill", 0.0)  # older checkpoints do not tell


# ---------------------------------------------------------------- what the rest of the package asks


def make_look(config: DQNRunConfig, spec: EnvSpec, network: nn.Module, state: Mapping[str, Any] | None) -> Look:
    """Q values of an observation and, from a checkpoint's state, its bonus."""
    rnd = None if state is None else make_rnd(spec, config.env.num_envs, config.rnd)
    if rnd is not None and state is not None:
        rnd.load_state_dict(state["rnd"])

    @torch.no_grad()
    def look(obs: Tensor) -> Insight:
        bonus = None if rnd is None else rnd.bonus(obs).item()
        return Insight("Q value", network(obs)[0].numpy(), bonus)

    return look


ENTRY = AgentEntry(
    make=DQNAgent,
    make_policy=lambda config, spec: make_q_network(spec, config.agent),
    action_scores=lambda network, obs, generator: network(obs),
    make_look=make_look,
)
