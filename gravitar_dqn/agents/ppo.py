"""PPO with curiosity (RND) and UNREAL's auxiliary tasks, all learned from one ring of single frames.

Schulman 2017 (arXiv 1707.06347), Burda 2018 (arXiv 1810.12894), Jaderberg 2016 (arXiv 1611.05397).

The rollout lies in the replay buffer too: its newest rows. The step after a game's end, which plays no action
(NEXT_STEP autoreset), counts nowhere but in the intrinsic stream, which no game's end cuts.
Shapes: T steps of a rollout, B environments, N rows of a minibatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from line_profiler import profile
from torch import Tensor, nn

from gravitar_dqn import losses
from gravitar_dqn.agents.auxiliary_tasks import TASKS, AuxiliaryTasks, task_weights
from gravitar_dqn.agents.base import Agent, AgentEntry, Array, Insight, Look, Means, Stateful
from gravitar_dqn.agents.rollout import (
    MakeOptimizer,
    Networks,
    Rollout,
    check_replay_fits,
    make_networks,
    optimizer_maker,
    replay_steps,
)
from gravitar_dqn.config import PPORunConfig
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import ActorCritic, make_actor_critic
from gravitar_dqn.replay import Bools, ReplayBuffer
from gravitar_dqn.rnd import RND, TRAINED_ENVS
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import prepare_optimizer, set_learning_rate

METRICS = (
    *"policy_loss value_loss_ext value_loss_int entropy approx_kl clip_fraction".split(),
    *(f"{task}_loss" for task in TASKS),
    *"int_return_mean explained_variance_ext explained_variance_int learning_rate".split(),
)  # columns that every run of PPO has, also where a part is not built


class PPOAgent(Agent):
    """The agent. With curiosity and tasks it is RANDAL; without both, plain PPO.

    Args:
        config: the run's settings.
        spec: what the environments show and take.
        device: where networks, replay and all statistics live.
        networks: what learns; by default those of the presets.
        make_optimizer: makes an optimizer of parameters; by default as the settings say.
    """

    config: PPORunConfig

    def __init__(
        self,
        config: PPORunConfig,
        spec: EnvSpec,
        device: torch.device,
        networks: Networks | None = None,
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        check_replay_fits(config, spec, device)
        settings, num_envs = config.agent, config.env.num_envs
        rows = settings.num_steps * num_envs
        replay = ReplayBuffer(
            replay_steps(config) * num_envs,
            num_envs,
            spec.frame_shape,
            spec.frame_dtype,
            stack=spec.stack,
            n_step=config.tasks.window if any(task_weights(config.tasks).values()) else 1,
            padding=config.stack_padding,
            device=device,
        )
        super().__init__(config, spec, device, replay)
        networks = networks or make_networks(config, spec)
        make_optimizer = make_optimizer or optimizer_maker(settings)
        self._policy = networks.policy.to(device)
        self.tasks = AuxiliaryTasks(config, self._policy, networks.heads, replay, self.generator).to(device)
        self.learners = nn.ModuleList([self._policy, self.tasks])
        self.optimizer = make_optimizer(self.learners.parameters())
        self.rnd: RND | None = None
        self.rnd_optimizer: torch.optim.Optimizer | None = None
        if networks.rnd is not None:
            self.rnd = RND(
                *networks.rnd,
                spec,
                num_envs,
                gamma=config.rnd.gamma,
                init_updates=config.rnd.init_updates,
                trained_envs=TRAINED_ENVS,
            ).to(device)
            self.rnd_optimizer = make_optimizer(self.rnd.predictor.parameters())

        features = int(networks.rnd[0].dense_size) if networks.rnd is not None else 0  # type: ignore[arg-type]
        self.rollout = Rollout.empty(settings.num_steps, num_envs, features, device)
        self.batch_size = rows // settings.num_minibatches
        self._minibatch = torch.zeros(self.batch_size, dtype=torch.int64, device=device)  # rows of the rollout
        self._log_probs, self._value_ext, self._value_int = (torch.zeros(num_envs, device=device) for _ in range(3))
        self._step = 0  # in the rollout
        self._random_left = config.rnd.init_steps if self.rnd is not None else 0
        self._make_means()
        self._capture()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Also those of parts that are not built."""
        return tuple(dict.fromkeys([*self.measured, *METRICS]))

    def _make_means(self) -> None:
        learned = "policy_loss value_loss_ext entropy approx_kl clip_fraction".split()
        learned += [f"{task}_loss" for task in self.tasks.names]
        played, largest = ["explained_variance_ext"], ""
        if self.rnd is not None:
            learned += ["value_loss_int", "rnd_loss"]
            played += "int_reward_mean int_return_mean explained_variance_int".split()
            largest = "int_reward_max"
        self._update_means = Means(learned, self.device)
        self._rollout_means = Means(played, self.device, largest)
        self._means = [self._update_means, self._rollout_means]

    # ---------------------------------------------------------------- playing

    @property
    def policy(self) -> ActorCritic:
        """The network that acts."""
        return self._policy

    @property
    def epsilon(self) -> float:
        """Probability of an action that the policy did not choose."""
        return 1.0 if self._random_left else 0.0

    def begin(self, obs: Array) -> None:
        """Start with the frames (B, *frame_shape) of freshly reset environments."""
        super().begin(obs)
        self._step = 0

    @profile
    def act(self) -> Tensor:
        """Actions (B,) int64 on the device, drawn from the policy. The tensor holds them until the next call."""
        if self._random_left:
            return self._actions.random_(self.spec.num_actions, generator=self.generator)
        self.select_actions()
        step, rollout = self._step, self.rollout
        rollout.log_probs[step], rollout.values_ext[step] = self._log_probs, self._value_ext
        rollout.values_int[step] = self._value_int
        return self._actions

    @torch.no_grad()
    def _select_actions(self) -> None:
        with self._autocast:
            logits, value_ext, value_int = self.policy(self._obs)
        self._actions.copy_(losses.gumbel_scores(logits, self.generator).argmax(dim=1))
        self._log_probs.copy_(losses.log_probs(logits, self._actions))
        self._value_ext.copy_(value_ext)
        self._value_int.copy_(value_int)

    def observe(
        self, actions: Tensor, rewards: Array, terminations: Bools, truncations: Bools, next_obs: Array, played: Bools
    ) -> None:
        """Take in one step of every environment: of the random start, or of the rollout."""
        ready = self.replay.sampleable  # before that, the tasks would have nothing to learn from
        super().observe(actions, rewards, terminations, truncations, next_obs, played)
        if self._random_left:
            self._random_left -= 1
            self._update_statistics(self.spec.newest(self._obs))
        elif ready:
            self._step += 1

    # ---------------------------------------------------------------- learning

    def update(self) -> int:
        """Learn from the rollout when it is full; returns the number of gradient steps."""
        settings = self.config.agent
        if self._step < settings.num_steps:
            return 0
        self.rollout.indices.copy_(self.replay.rollout(settings.num_steps))
        self._set_learning_rate()
        self.compute_advantages()
        for _ in range(settings.update_epochs):
            order = torch.randperm(len(self.rollout.valid), device=self.device, generator=self.generator)
            for rows in order.view(settings.num_minibatches, -1):
                self._minibatch.copy_(rows)
                self.update_policy()
        if self.rnd is not None or "pixel_control" in self.tasks.names:
            self.update_normalizers()
        done = settings.update_epochs * settings.num_minibatches
        self.num_updates += done
        self._step = 0
        return done

    @profile
    @torch.no_grad()
    def _compute_advantages(self) -> None:
        """Bonus, returns and advantages of the rollout."""
        config, settings, rollout, replay = self.config, self.config.agent, self.rollout, self.replay
        with self._autocast:
            _, value_ext, value_int = self.policy(replay.stacks(rollout.indices[-1]))
        rollout.values_ext[-1], rollout.values_int[-1] = value_ext, value_int
        before = rollout.indices[:-1]
        rewards = losses.learned_rewards(replay.rewards.view(-1)[before], settings.clip_rewards, settings.reward_scale)
        terminations = replay.terminations.view(-1)[before]
        dones = terminations | replay.truncations.view(-1)[before]
        rollout.valid.copy_(replay.valid.view(-1)[before].view(-1))
        adv_ext = losses.gae(rewards, rollout.values_ext, settings.gamma, settings.gae_lambda, terminations, dones)
        advantages = settings.ext_coef * adv_ext
        rollout.returns_ext.copy_((adv_ext + rollout.values_ext[:-1]).view(-1))
        means = {
            "explained_variance_ext": losses.explained_variance(
                rollout.values_ext[:-1].reshape(-1), rollout.returns_ext, rollout.valid
            )
        }
        if self.rnd is not None:
            bonus = self._int_rewards(self.rnd)
            # The coefficient is in the reward, and so in the advantages: with it only there, the bonus's value, with
            # returns many times those of the score, would take nearly all of the trunk's gradient.
            int_rewards = config.rnd.coef * bonus
            # No game's end cuts the intrinsic stream: what is new stays so in the next game.
            never = torch.zeros_like(dones)
            adv_int = losses.gae(int_rewards, rollout.values_int, config.rnd.gamma, settings.gae_lambda, never, never)
            advantages = advantages + adv_int
            rollout.returns_int.copy_((adv_int + rollout.values_int[:-1]).view(-1))
            means |= {
                "int_reward_mean": bonus.mean(),
                "int_reward_max": bonus.max(),
                "int_return_mean": rollout.returns_int.mean(),
                "explained_variance_int": losses.explained_variance(
                    rollout.values_int[:-1].reshape(-1), rollout.returns_int, torch.ones_like(rollout.valid)
                ),
            }
        rollout.advantages.copy_(advantages.view(-1))
        if settings.normalize_advantages:
            rollout.advantages.copy_(losses.normalized(rollout.advantages, rollout.valid, distributed.masked_mean))
        self._rollout_means.add(means)

    def _int_rewards(self, rnd: RND) -> Tensor:
        """Normalized bonus (T, B) of the frames that the rollout's actions led to."""
        after, features = self.rollout.after, self.rollout.features
        bonuses = torch.empty(len(after), device=self.device)
        for rows in self._chunks():
            with self._autocast:
                bonuses[rows], features[rows] = rnd.errors(self._frames(after[rows]))
        return rnd.rollout_rewards(bonuses.view(-1, self.config.env.num_envs))

    def _chunks(self) -> list[slice]:
        """The rollout's rows in pieces as long as a minibatch, which bounds the memory."""
        return [slice(i, i + self.batch_size) for i in range(0, len(self.rollout.valid), self.batch_size)]

    @profile
    def _update_policy(self) -> None:
        max_norm, rows = self.config.agent.max_grad_norm, self._minibatch
        with self._autocast:
            loss, metrics = self._policy_loss(rows)
            task_losses = self.tasks.losses()
            if self.rnd is not None:
                frames = self._frames(self.rollout.after[rows])
                errors = self.rnd.errors_against(frames, self.rollout.features[rows])
                metrics["rnd_loss"] = self.rnd.predictor_loss(errors, self.generator)
                loss = loss + metrics["rnd_loss"]
        for optimizer in self._optimizers():
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learners = list(self.learners.parameters())
        of_tasks = {name: losses.gradients(task_loss, learners) for name, task_loss in task_losses.items()}
        predictor = [] if self.rnd is None else list(self.rnd.predictor.parameters())
        distributed.average_gradients([*learners, *predictor], *of_tasks.values())
        if max_norm > 0:
            nn.utils.clip_grad_norm_(learners, max_norm)
            if predictor:
                nn.utils.clip_grad_norm_(predictor, max_norm)
        for name, found in of_tasks.items():  # each clipped alone, so that none can drown the policy
            for parameter, gradient in losses.task_gradients(found, max_norm, self.tasks.weights[name]).items():
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            metrics[f"{name}_loss"] = task_losses[name]
        for optimizer in self._optimizers():
            optimizer.step()
        self._update_means.add(metrics)

    def _policy_loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss with the values', of the rollout's rows (N,), and what of it is charted."""
        settings, rollout = self.config.agent, self.rollout
        indices, valid = rollout.before[rows], rollout.valid[rows]
        logits, value_ext, value_int = self.policy(self.replay.stacks(indices))
        log_probs = losses.log_probs(logits, self.replay.actions.view(-1)[indices].long())
        old_log_probs, advantages = rollout.log_probs.view(-1)[rows], rollout.advantages[rows]
        clip_loss, approx_kl, clip_fraction = losses.ppo_loss(
            log_probs, old_log_probs, advantages, valid, settings.clip_coef
        )
        entropy = losses.masked_mean(losses.entropy(logits), valid)
        ext_loss = losses.value_loss(value_ext, rollout.returns_ext[rows], valid)
        metrics = {"policy_loss": clip_loss, "value_loss_ext": ext_loss, "entropy": entropy}
        metrics |= {"approx_kl": approx_kl, "clip_fraction": clip_fraction}
        loss = distributed.weighted(clip_loss - settings.ent_coef * entropy + ext_loss, valid)
        if self.rnd is not None:
            int_loss = losses.value_loss(value_int, rollout.returns_int[rows], torch.ones_like(valid))
            metrics["value_loss_int"] = int_loss
            loss = loss + int_loss
        return loss, metrics

    @torch.no_grad()
    def _update_normalizers(self) -> None:
        """Take the rollout's frames into the statistics, after all that used the old ones."""
        for rows in self._chunks():
            self._update_statistics(self._frames(self.rollout.after[rows]))

    def _update_statistics(self, frames: Tensor) -> None:
        if self.rnd is not None:
            self.rnd.obs_rms.update(frames)
        if "pixel_control" in self.tasks.names:
            self.tasks.update_pixel_range(frames)

    def _frames(self, indices: Tensor) -> Tensor:
        """What curiosity sees at flat indices (N,): (N, 1, 84, 84) or (N, n), as stored."""
        return self.replay.frames[indices].view(-1, *self.spec.newest_shape)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.rnd_optimizer is None else [self.optimizer, self.rnd_optimizer]

    def _set_learning_rate(self) -> None:
        for optimizer in self._optimizers():
            set_learning_rate(optimizer, self._scheduled_learning_rate(self.config.agent))

    def _capture(self) -> None:
        for optimizer in self._optimizers():
            prepare_optimizer(optimizer, self.config.agent.learning_rate, self._graphs, self.device, changes=True)
        self._set_learning_rate()
        self.select_actions, self.compute_advantages, self.update_policy, self.update_normalizers = self._prepared(
            self._select_actions, self._compute_advantages, self._update_policy, self._update_normalizers
        )

    # ---------------------------------------------------------------- metrics and state

    def _parts(self) -> dict[str, Stateful | None]:
        parts: dict[str, Stateful | None] = {"policy": self.policy, "tasks": self.tasks, "optimizer": self.optimizer}
        return parts | {"rnd": self.rnd, "rnd_optimizer": self.rnd_optimizer}

    def _counters(self) -> tuple[str, ...]:
        return ("random_left",)


# ---------------------------------------------------------------- what the rest of the package asks


def make_look(config: PPORunConfig, spec: EnvSpec, network: nn.Module, state: Mapping[str, Any] | None) -> Look:
    """Probabilities of the actions and, from a checkpoint's state, bonus and pixel control."""
    assert isinstance(network, ActorCritic)
    policy, rnd, heads = network, None, nn.ModuleDict()
    if state is not None:
        networks = make_networks(config, spec)
        heads = networks.heads
        heads.load_state_dict({k.removeprefix("heads."): v for k, v in state["tasks"].items() if "heads." in k})
        if networks.rnd is not None:
            rnd = RND(*networks.rnd, spec, config.env.num_envs, gamma=config.rnd.gamma, init_updates=0)
            rnd.load_state_dict(state["rnd"])

    @torch.no_grad()
    def look(obs: Tensor) -> Insight:
        features = policy.trunk(obs)
        probabilities = policy.heads(features)[0].softmax(dim=1)[0].numpy()
        bonus = None if rnd is None else rnd.bonus(obs).item()
        cells = heads["pixel_control"](features)[0].amax(dim=0).numpy() if "pixel_control" in heads else None
        return Insight("probability", probabilities, bonus, cells)

    return look


ENTRY = AgentEntry(
    make=PPOAgent,
    make_policy=lambda config, spec: make_actor_critic(spec),
    action_scores=lambda network, obs, generator: losses.gumbel_scores(network(obs)[0], generator),
    make_look=make_look,
)
