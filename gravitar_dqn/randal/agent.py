"""RANDAL: PPO with curiosity (RND) and UNREAL's auxiliary tasks, all learned from one ring of single frames.

Schulman 2017 (arXiv 1707.06347), Burda 2018 (arXiv 1810.12894), Jaderberg 2016 (arXiv 1611.05397).

The rollout lies in the replay buffer too: its newest rows. What is kept beside it of every step are the values and
the action's log-probability at the time. The step after a game's end, which plays no action (NEXT_STEP autoreset),
counts nowhere but in the intrinsic stream, which no game's end cuts.

Networks work in functions that take and give nothing (`_choose`, `_finish`, `_learn`, `_look`), on tensors that stay
where they are, so that a CUDA graph can hold each of them.
Shapes: T steps of a rollout, B environments, N rows of a minibatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import torch
from line_profiler import profile
from torch import Tensor, nn

from gravitar_dqn import returns
from gravitar_dqn.config import RANDALConfig, UserError
from gravitar_dqn.envs import EnvSpec
from gravitar_dqn.execution import (
    choose_device,
    choose_execution,
    choose_precision,
    prepare,
    prepare_optimizer,
    restore_generator,
    set_learning_rate,
)
from gravitar_dqn.networks import newest_of, newest_shape
from gravitar_dqn.randal.curiosity import Curiosity
from gravitar_dqn.randal.networks import PPOIntrinsic, network_classes
from gravitar_dqn.randal.tasks import TASKS, AuxiliaryTasks, task_weights
from gravitar_dqn.replay import Bools, ReplayBuffer, plan_memory
from gravitar_dqn.tracking import METRICS, warn

Array = npt.NDArray[Any]

CLOCKS = ("global_step", "episodes", "num_updates")
# Means over gradient steps, and over rollouts.
STEP_METRICS = (
    *"policy_loss value_loss_ext value_loss_int entropy approx_kl clip_fraction rnd_loss".split(),
    *(f"{task}_loss" for task in TASKS),
)
CURIOUS_METRICS = ("rnd_loss", "value_loss_int", "int_reward_mean", "int_return_mean", "explained_variance_int")
ROLLOUT_METRICS = ("int_reward_mean", "int_return_mean", "explained_variance_ext", "explained_variance_int")


@dataclass(frozen=True)
class PPOConfig:
    """How RANDAL's policy learns."""

    lr: float = 1e-4
    """The optimizer's learning rate at the start."""
    lr_final: float = 1e-4
    """After decay_steps."""
    decay_steps: int = 0
    """Agent steps over which the learning rate changes linearly; 0: it stays."""
    grad_clip: float = 0.5
    """Gradients of policy and predictor are clipped to this norm, each; 0 never clips."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    entropy_coeff: float = 0.01
    """Weight of the policy's entropy."""
    policy_clip: float = 0.1
    """The policy's ratio is clipped to 1 +- this."""


class RANDAL:
    """The agent. `attach` gives it what depends on the environments and on the run; then the loop can play it.

    Args:
        policy_model: class of the policy's trunk, such as `NatureCNN` or `MLP`; its instances have `dense_size`.
        target_model: class of curiosity's networks, such as `PredictorCNN` or `PredictorMLP`.
        input_size: shape of an observation, (4, 84, 84) or (n,).
        action_size: number of actions.
        config: how the policy learns.
        pixel_control: whether to build that task; pictures only.
        intr_coeff, extr_coeff: weights of intrinsic and extrinsic advantages; intr_coeff 0 builds no curiosity.
        RP, VR, PC: weights of reward prediction, value replay and pixel control; 0 builds no head and does no work.
        policy_args, RND_args: further arguments of the two classes.
        optim, optim_args: the optimizers' class, and its arguments beside the learning rate.
    """

    learns_while_playing = False
    metric_names = tuple(
        name
        for name in (*STEP_METRICS, *ROLLOUT_METRICS, "learning_rate")
        if name not in METRICS  # those every agent has
    )

    def __init__(
        self,
        policy_model: type[nn.Module],
        target_model: type[nn.Module],
        input_size: tuple[int, ...],
        action_size: int,
        config: PPOConfig,
        *,
        pixel_control: bool = True,
        intr_coeff: float = 0.5,
        extr_coeff: float = 1.0,
        RP: float = 1.0,
        VR: float = 1.0,
        PC: float = 1.0,
        policy_args: Mapping[str, Any] | None = None,
        RND_args: Mapping[str, Any] | None = None,
        optim: type[torch.optim.Optimizer] = torch.optim.Adam,
        optim_args: Mapping[str, Any] | None = None,
    ) -> None:
        weights = dict(zip(TASKS, (PC if pixel_control else 0.0, RP, VR), strict=True))
        if weights["pixel_control"] > 0 and len(input_size) != 3:
            raise UserError(
                "pixel control needs pictures, not numbers: the preset randal-cartpole, or --tasks.pixel-control 0 "
                "(from Python: PC=0), goes without it"
            )
        self.ppo, self.device = config, choose_device(config.device)
        self.input_size, self.num_actions = input_size, action_size
        self.intr_coeff, self.extr_coeff = intr_coeff, extr_coeff

        def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
            make: Any = optim
            optimizer: torch.optim.Optimizer = make(network.parameters(), lr=config.lr, **(optim_args or {}))
            return optimizer

        self.policy = PPOIntrinsic(policy_model, input_size, action_size, **(policy_args or {}))
        self.tasks = AuxiliaryTasks(weights, self.policy, action_size)
        self.learners = nn.ModuleList([self.policy, self.tasks]).to(self.device)
        self.optimizer = optimizer_of(self.learners)
        self.curiosity: Curiosity | None = None
        self.rnd_optimizer: torch.optim.Optimizer | None = None
        if intr_coeff != 0:
            self.curiosity = Curiosity(target_model, newest_shape(input_size), RND_args).to(self.device)
            self.rnd_optimizer = optimizer_of(self.curiosity.predictor)

    def attach(self, config: RANDALConfig, spec: EnvSpec) -> RANDAL:
        """Get ready for a run: replay buffer, rollout, clocks, random numbers. Gives itself."""
        settings, num_envs, device = config.agent, config.env.num_envs, self.device
        steps, rows = settings.num_steps, settings.num_steps * num_envs
        # What was decided when the agent was made stands.
        weights: dict[str, Any] = self.tasks.weights
        rnd, tasks = replace(config.rnd, coef=self.intr_coeff), replace(config.tasks, **weights)
        self.config = config = replace(config, rnd=rnd, tasks=tasks)
        self.replay = ReplayBuffer(
            replay_steps(config) * num_envs,
            num_envs,
            spec.frame_shape,
            spec.frame_dtype,
            stack=spec.stack,
            n_step=config.tasks.window if any(self.tasks.weights.values()) else 1,
            padding=config.stack_padding,
            device=device,
        )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.tasks.attach(config, self.replay, self.generator)
        if self.curiosity is not None:
            self.curiosity.attach(num_envs, config.rnd.gamma, config.rnd.init_updates)
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=choose_precision(config.precision, device) == "bf16"
        )
        self._graphs = choose_execution(config.execution, device) == "graphs"

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._obs = zeros(num_envs, *self.replay.obs_shape, dtype=spec.frame_dtype)  # the newest
        self._actions = zeros(num_envs, dtype=torch.int64)
        self._chosen = zeros(3, num_envs)  # of the newest actions: log-probability and both values
        self._kept = zeros(steps + 1, 3, num_envs)  # the same of the rollout, and the values after it
        self._positions = zeros(steps + 1, num_envs, dtype=torch.int64)  # of the rollout's frames in the buffer
        self._advantages, self._returns, self._played = zeros(rows), zeros(2, rows), zeros(rows)
        self._features = zeros(rows, self.curiosity.target.dense_size if self.curiosity else 0)  # of RND's target
        self._rows = zeros(rows // settings.num_minibatches, dtype=torch.int64)  # of the minibatch
        self._step_sums, self._rollout_sums = zeros(len(STEP_METRICS)), zeros(len(ROLLOUT_METRICS))
        self._int_max = torch.full((), -torch.inf, device=device)
        self._num_steps = self._num_rollouts = 0  # in those sums

        self.global_step = 0  # agent steps played, over all environments
        self.episodes = 0  # games finished
        self.num_updates = 0  # gradient steps
        self.batch_size = len(self._rows)
        self.messages: list[str] = []
        self._step = 0  # in the rollout
        self._random_left = config.rnd.init_steps if self.curiosity is not None else 0
        self._capture()
        return self

    # ---------------------------------------------------------------- playing

    @property
    def epsilon(self) -> float:
        """Probability of an action that the policy did not choose."""
        return 1.0 if self._random_left else 0.0

    @property
    def filling(self) -> int | None:
        """Transitions stored while the replay buffer is not full yet; None from then on."""
        return None if self.replay.full else len(self.replay)

    def begin(self, obs: Array) -> None:
        """Start with the frames (B, *frame_shape) of freshly reset environments."""
        self.replay.begin(obs)
        self.replay.latest(out=self._obs)
        self._step = 0

    @profile
    def act(self) -> Tensor:
        """Actions (B,) int64 on the device, drawn from the policy. The tensor holds them until the next call."""
        if self._random_left:
            return self._actions.random_(self.num_actions, generator=self.generator)
        self.choose()
        self._kept[self._step] = self._chosen
        return self._actions

    @torch.no_grad()
    def _choose(self) -> None:
        with self._autocast:
            logits, value_ext, value_int = self.policy(self._obs)
        self._actions.copy_(returns.sample_scores(logits, self.generator).argmax(dim=1))
        self._chosen.copy_(torch.stack([returns.log_probs(logits, self._actions), value_ext, value_int]))

    @profile
    def observe(
        self, actions: Tensor, rewards: Array, terminations: Bools, truncations: Bools, next_obs: Array, played: Bools
    ) -> None:
        """Take in one step of every environment; arrays as Gymnasium gives them.

        `played` (B,) is false where the step was the dummy one after a game's end.
        """
        ready = self.replay.sampleable  # before that, the tasks would have nothing to learn from
        self.replay.put(actions, rewards, terminations, truncations, next_obs, played)
        self.replay.latest(out=self._obs)
        self.global_step += int(played.sum())
        self.episodes += int(((terminations | truncations) & played).sum())
        if self._random_left:
            self._random_left -= 1
            self._see(newest_of(self._obs))
        elif ready:
            self._step += 1

    # ---------------------------------------------------------------- learning

    def update(self) -> int:
        """Learn from the rollout when it is full; gives the number of gradient steps."""
        settings = self.config.agent
        if self._step < settings.num_steps:
            return 0
        self._positions.copy_(self.replay.rollout(settings.num_steps))
        self._set_learning_rate()
        self.finish()
        self._num_rollouts += 1
        for _ in range(settings.update_epochs):
            order = torch.randperm(self._played.numel(), device=self.device, generator=self.generator)
            for rows in order.view(settings.num_minibatches, -1):
                self._rows.copy_(rows)
                self.learn()
                self._num_steps += 1
        if self.curiosity is not None or self.tasks.weights["pixel_control"] > 0:
            self.look()
        done = settings.update_epochs * settings.num_minibatches
        self.num_updates += done
        self._step = 0
        return done

    @profile
    @torch.no_grad()
    def _finish(self) -> None:
        """Bonus, returns and advantages of the rollout."""
        settings, before = self.config.agent, self._positions[:-1]
        with self._autocast:
            _, value_ext, value_int = self.policy(self.replay.stacks(self._positions[-1]))
        self._kept[-1] = torch.stack([torch.zeros_like(value_ext), value_ext, value_int])
        values_ext, values_int = self._kept[:, 1], self._kept[:, 2]
        rewards = returns.learned_rewards(
            self.replay.rewards.view(-1)[before], settings.clip_rewards, settings.reward_scale
        )
        terminations = self.replay.terminations.view(-1)[before]
        dones = terminations | self.replay.truncations.view(-1)[before]
        int_rewards = self._int_rewards()
        adv_ext = returns.gae(rewards, values_ext, settings.gamma, settings.gae_lambda, terminations, dones)
        # No game's end cuts the intrinsic stream: what is new stays so in the next game.
        never = torch.zeros_like(dones)
        adv_int = returns.gae(int_rewards, values_int, self.config.rnd.gamma, settings.gae_lambda, never, never)
        self._played.copy_(self.replay.playable.view(-1)[before].view(-1))
        advantages = (self.extr_coeff * adv_ext + self.intr_coeff * adv_int).view(-1)
        if settings.normalize_advantages:
            advantages = returns.normalized(advantages, self._played)
        self._advantages.copy_(advantages)
        self._returns[0] = (adv_ext + values_ext[:-1]).view(-1)
        self._returns[1] = (adv_int + values_int[:-1]).view(-1)
        told = [
            int_rewards.mean(),
            self._returns[1].mean(),
            returns.explained_variance(values_ext[:-1].reshape(-1), self._returns[0], self._played),
            returns.explained_variance(values_int[:-1].reshape(-1), self._returns[1], torch.ones_like(self._played)),
        ]
        self._rollout_sums += torch.stack(told)
        self._int_max.copy_(torch.maximum(self._int_max, int_rewards.max()))

    def _int_rewards(self) -> Tensor:
        """Normalized bonus (T, B) of the frames that the rollout's actions led to."""
        following = self._positions[1:]
        if self.curiosity is None:
            return torch.zeros(following.shape, device=self.device)
        bonus = torch.empty(following.numel(), device=self.device)
        for rows in self._chunks():
            seen = self.curiosity.normalized(self._frames(following.reshape(-1)[rows]))
            with self._autocast:
                bonus[rows], self._features[rows] = self.curiosity.errors(seen)
        return self.curiosity.rewards(bonus.view(following.shape))

    def _chunks(self) -> list[slice]:
        """The rollout's rows in pieces as long as a minibatch, which bounds the memory."""
        length = len(self._rows)
        return [slice(start, start + length) for start in range(0, len(self._played), length)]

    @profile
    def _learn(self) -> None:
        """One gradient step on the minibatch, the auxiliary tasks and the predictor."""
        with self._autocast:
            policy_loss, told = self._policy_loss(self._rows)
            task_losses = self.tasks.losses()
            rnd_loss = self._rnd_loss(self._rows)
        learners = list(self.learners.parameters())
        optimizers = [(self.optimizer, learners)]
        if self.curiosity is not None and self.rnd_optimizer is not None:
            optimizers.append((self.rnd_optimizer, list(self.curiosity.predictor.parameters())))
        for optimizer, _ in optimizers:
            optimizer.zero_grad()
        (policy_loss + rnd_loss).backward()  # type: ignore[no-untyped-call]
        if self.ppo.grad_clip > 0:
            for _, parameters in optimizers:
                nn.utils.clip_grad_norm_(parameters, self.ppo.grad_clip)
        for name, task_loss in task_losses.items():  # each clipped alone, so that none can drown the policy
            returns.add_gradient(task_loss, learners, self.ppo.grad_clip, self.tasks.weights[name])
        for optimizer, _ in optimizers:
            optimizer.step()
        nothing = torch.zeros_like(rnd_loss)
        told += [rnd_loss, *(task_losses.get(name, nothing) for name in TASKS)]
        self._step_sums += torch.stack([value.detach() for value in told])

    def _policy_loss(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """PPO's loss with both values', and what of it is told."""
        positions, played = self._positions.view(-1)[rows], self._played[rows]
        logits, value_ext, value_int = self.policy(self.replay.stacks(positions))
        actions = self.replay.actions.view(-1)[positions].long()
        clip_loss, approx_kl, clip_fraction = returns.ppo_loss(
            returns.log_probs(logits, actions),
            self._kept[:-1, 0].reshape(-1)[rows],
            self._advantages[rows],
            played,
            self.ppo.policy_clip,
        )
        entropy = returns.masked_mean(returns.entropy(logits), played)
        ext_loss = returns.value_loss(value_ext, self._returns[0, rows], played)
        int_loss = returns.value_loss(value_int, self._returns[1, rows], torch.ones_like(played))
        loss = clip_loss - self.ppo.entropy_coeff * entropy + ext_loss
        if self.curiosity is not None:
            loss = loss + int_loss
        return loss, [clip_loss, ext_loss, int_loss, entropy, approx_kl, clip_fraction]

    def _rnd_loss(self, rows: Tensor) -> Tensor:
        if self.curiosity is None:
            return torch.zeros((), device=self.device)
        seen = self.curiosity.normalized(self._frames(self._positions[1:].reshape(-1)[rows]))
        return self.curiosity.loss(self.curiosity.errors_against(seen, self._features[rows]), self.generator)

    @torch.no_grad()
    def _look(self) -> None:
        """Take the rollout's frames into the statistics, after all that used the old ones."""
        following = self._positions[1:].reshape(-1)
        for rows in self._chunks():
            self._see(self._frames(following[rows]))

    def _see(self, frames: Tensor) -> None:
        if self.curiosity is not None:
            self.curiosity.obs_rms.update(frames)
        if self.tasks.weights["pixel_control"] > 0:
            self.tasks.see(frames)

    def _frames(self, positions: Tensor) -> Tensor:
        """What curiosity sees at flat positions (N,): (N, 1, 84, 84) or (N, n), as stored."""
        return self.replay.frames[positions].view(-1, *newest_shape(self.input_size))

    def _set_learning_rate(self) -> None:
        done = min(self.global_step / self.ppo.decay_steps, 1.0) if self.ppo.decay_steps else 0.0
        self.learning_rate = self.ppo.lr + done * (self.ppo.lr_final - self.ppo.lr)
        for optimizer in filter(None, (self.optimizer, self.rnd_optimizer)):
            set_learning_rate(optimizer, self.learning_rate)

    def _capture(self) -> None:
        """Decide how the four functions run; with graphs, capture them anew."""
        for optimizer in filter(None, (self.optimizer, self.rnd_optimizer)):
            prepare_optimizer(optimizer, self.ppo.lr, self._graphs, self.device, changes=True)
        self._set_learning_rate()
        functions = (self._choose, self._finish, self._learn, self._look)
        self.choose, self.finish, self.learn, self.look = (
            prepare(function, self._graphs, self.generator, self.device, warn) for function in functions
        )

    # ---------------------------------------------------------------- the published names of its mathematics

    def norm_obs(self, obs: Tensor) -> Tensor:
        """Frames scaled to [0, 1] by the darkest and the brightest pixel seen; one pair for the whole frame."""
        return self.tasks.norm_obs(obs)

    @staticmethod
    def pixel_loss(Qaux: Tensor, Qaux_actions: Tensor, Qaux_target: Tensor) -> Tensor:
        """Half the mean squared error of the chosen actions' cells: (N, A, 21, 21), (N,) int64, (N, 21, 21)."""
        return returns.pixel_control_loss(Qaux, Qaux_actions, Qaux_target)

    def predictor_loss(self, next_states: Tensor, state_mean: Tensor, state_std: Tensor) -> Tensor:
        """Mean squared RND error of frames (N, 1, 84, 84) or (N, n), 0..255. A gradient step takes a share of them."""
        if self.curiosity is None:
            raise UserError("intr_coeff is 0: there is no predictor")
        errors, _ = self.curiosity.errors(self.curiosity.normalized(next_states, state_mean, state_std))
        return errors.mean()

    # ---------------------------------------------------------------- telling and keeping

    def metrics(self) -> dict[str, float]:
        """Means since the last call, NaN where nothing happened."""
        # This is a CPU-GPU sync point.
        sums = torch.cat([self._step_sums, self._rollout_sums, self._int_max[None]]).tolist()
        nan = float("nan")
        counts = [self._num_steps] * len(STEP_METRICS) + [self._num_rollouts] * len(ROLLOUT_METRICS)
        names = (*STEP_METRICS, *ROLLOUT_METRICS)
        told = {
            name: total / count if count else nan for name, total, count in zip(names, sums[:-1], counts, strict=True)
        }
        told |= {f"{task}_loss": nan for task in TASKS if self.tasks.weights[task] == 0}
        if self.curiosity is None:
            told |= dict.fromkeys(CURIOUS_METRICS, nan)
        told |= {"epsilon": nan, "td_loss": nan, "q_mean": nan, "buffer_fill": self.replay.fill}
        told["int_reward_max"] = sums[-1] if self._num_rollouts and self.curiosity is not None else nan
        told["learning_rate"] = self.learning_rate
        self._step_sums.zero_()
        self._rollout_sums.zero_()
        self._int_max.fill_(-torch.inf)
        self._num_steps = self._num_rollouts = 0
        return told

    def policy_state(self) -> dict[str, Any]:
        """The policy's weights, for recordings."""
        return self.policy.state_dict()

    def _parts(self) -> dict[str, Any]:
        """All that has a state of its own."""
        parts = {"policy": self.policy, "tasks": self.tasks, "optimizer": self.optimizer}
        return parts | {"curiosity": self.curiosity, "rnd_optimizer": self.rnd_optimizer}

    def state_dict(self, *, replay: bool = False) -> dict[str, Any]:
        """All that learning depends on; the replay buffer only where asked for. A rollout begun is not kept."""
        return {
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            "generator": self.generator.get_state(),
            "clocks": {name: getattr(self, name) for name in CLOCKS},
            "random_left": self._random_left,
            "replay": self.replay.state_dict() if replay else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Then call `begin`."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        restore_generator(self.generator, state["generator"], self.config.seed + state["clocks"]["global_step"])
        for name in CLOCKS:
            setattr(self, name, int(state["clocks"][name]))
        self._random_left = int(state["random_left"])
        if state["replay"] is not None:
            self.replay.load_state_dict(state["replay"])
        self._capture()  # the optimizers have new tensors


def replay_steps(config: RANDALConfig) -> int:
    """Steps of every environment that the replay buffer keeps: for the tasks, or the rollout alone."""
    steps = config.agent.num_steps
    return max(config.tasks.replay_length, steps) if any(task_weights(config).values()) else steps


def plan_replay(config: RANDALConfig, spec: EnvSpec, device: torch.device) -> str:
    """A line with the replay buffer's size, to print before it is allocated; UserError when it would not fit."""
    steps, num_envs = replay_steps(config), config.env.num_envs
    setting = "--agent.num-steps" if steps == config.agent.num_steps else "--tasks.replay-length"
    return plan_memory(steps * num_envs, spec.frame_shape, spec.frame_dtype, device, setting, num_envs)


def make_randal(config: RANDALConfig, spec: EnvSpec) -> RANDAL:
    """The agent that a run's settings ask for, attached."""
    settings, tasks = config.agent, config.tasks
    adam = settings.optimizer == "adam"
    agent = RANDAL(
        *network_classes(spec.obs_shape),
        spec.obs_shape,
        spec.num_actions,
        PPOConfig(
            lr=settings.learning_rate,
            lr_final=settings.learning_rate_end,
            decay_steps=settings.learning_rate_decay,
            grad_clip=settings.max_grad_norm,
            device=config.device,
            entropy_coeff=settings.ent_coef,
            policy_clip=settings.clip_coef,
        ),
        intr_coeff=config.rnd.coef,
        extr_coeff=settings.ext_coef,
        RP=tasks.reward_prediction,
        VR=tasks.value_replay,
        PC=tasks.pixel_control,
        optim=torch.optim.Adam if adam else torch.optim.RMSprop,
        optim_args={"fused": True} if adam else {"eps": 1e-5},
    )
    return agent.attach(config, spec)
