"""What is seen of PPO: its metrics, and the panel beside a film."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gravitar_dqn.agents.auxiliary_tasks import TASKS
from gravitar_dqn.agents.base import Insight, Look
from gravitar_dqn.agents.ppo_parts import make_networks
from gravitar_dqn.config import PPORunConfig
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.networks import ActorCritic
from gravitar_dqn.rnd import RND

METRICS = (
    *"policy_loss value_loss_ext value_loss_int entropy approx_kl clip_fraction".split(),
    *(f"{task}_loss" for task in TASKS),
    *"int_return_mean explained_variance_ext explained_variance_int learning_rate".split(),
)  # of its own, beside those that every run has


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
