"""What is seen of PPO: its metrics, its charts, and the panel beside a film."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gravitar_dqn.agents.auxiliary_tasks import TASKS, task_weights
from gravitar_dqn.agents.base import Insight, Look
from gravitar_dqn.agents.ppo_parts import make_networks
from gravitar_dqn.charts import (
    BUFFER,
    INT_REWARD,
    LOG,
    NO_BONUS,
    OF_CURIOSITY,
    ORANGE,
    SCORE,
    TO_ZERO,
    Chart,
    Layout,
    Line,
    learning_starts,
    speed_chart,
    without,
)
from gravitar_dqn.config import PPORunConfig
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.rnd import RND

METRICS = (
    *"policy_loss value_loss_ext value_loss_int entropy approx_kl clip_fraction".split(),
    *(f"{task}_loss" for task in TASKS),
    *"int_return_mean explained_variance_ext explained_variance_int learning_rate".split(),
)  # of its own, beside those that every run has


def charts(config: PPORunConfig, frames_per_step: int) -> Layout:
    """What the dashboard draws: what this run's curiosity and tasks can have data for."""
    curious = config.rnd.coef > 0
    never = {f"{task}_loss" for task, weight in task_weights(config.tasks).items() if weight == 0}
    if not curious:
        never |= OF_CURIOSITY | {"value_loss_int", "explained_variance_int", "int_return_mean"}
    later = learning_starts(config.first_update)
    values = (Line("score", "value_loss_ext"), Line("bonus", "value_loss_int", ORANGE))
    predicted = (Line("RND predictor", "rnd_loss"), Line("reward prediction", "reward_prediction_loss", ORANGE))
    replayed = (Line("pixel control", "pixel_control_loss"), Line("value replay", "value_replay_loss", ORANGE))
    explained = (Line("score", "explained_variance_ext"), Line("bonus", "explained_variance_int", ORANGE))
    change = (Line("KL", "approx_kl"), Line("clipped share", "clip_fraction", ORANGE))
    int_return = (Line("mean", "int_return_mean"),)
    drawn = (
        SCORE,
        INT_REWARD,
        Chart("int_return", "Return, intrinsic", "discounted return", int_return, empty=NO_BONUS),
        Chart("policy_loss", "Policy loss", "loss", (Line("loss", "policy_loss"),), empty=later),
        Chart("value_loss", "Value losses", "loss (log)", values, LOG, later),
        Chart("predicted", "Prediction losses", "loss (log)", predicted, LOG, later),
        Chart("replayed", "Replayed losses", "loss (log)", replayed, LOG, later),
        Chart("entropy", "Entropy", "entropy", (Line("entropy", "entropy"),), TO_ZERO, later),
        Chart("change", "Change of the policy", "KL divergence, share", change, TO_ZERO, later),
        Chart("explained", "Explained variance", "share", explained, {"range": [-1, 1.05]}, later),
        speed_chart(frames_per_step),
        BUFFER,
    )
    return Layout(without(drawn, never))


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
