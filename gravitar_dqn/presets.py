"""The named runs. Every preset is a whole configuration; the command line changes it field by field."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gravitar_dqn.config import (
    DQNRunConfig,
    DQNSettings,
    EnvSettings,
    PPORNDSettings,
    PPORunConfig,
    PPOSettings,
    RNDSettings,
    RunConfig,
    TaskSettings,
    build,
)
from gravitar_dqn.errors import UserError, did_you_mean

PRETRAINED = Path(__file__).resolve().parent / "pretrained"  # weights that ship

GRAVITAR = DQNRunConfig()
PUBLISHED_PPO = PPOSettings(  # RND's and RANDAL's
    update_epochs=4,
    num_minibatches=4,
    learning_rate=1e-4,
    learning_rate_end=1e-4,
    gamma=0.999,
    normalize_advantages=False,
    clip_coef=0.1,
    ent_coef=0.001,
    clip_rewards=True,
    reward_scale=1.0,
)
NO_TASKS = TaskSettings(pixel_control=0.0, reward_prediction=0.0, value_replay=0.0)
RANDAL_PRESET = PPORunConfig(env=EnvSettings(num_envs=64, max_frames=18_000))  # at most 4 500 steps, as published
PPO = PPORunConfig(preset="ppo", env=EnvSettings(num_envs=64), rnd=PPORNDSettings(coef=0.0), tasks=NO_TASKS)

PRESETS: dict[str, RunConfig] = {
    "gravitar": GRAVITAR,
    "breakout": replace(
        GRAVITAR, preset="breakout", env=EnvSettings(id="ALE/Breakout-v5"), agent=DQNSettings(reward_scale=1.0)
    ),
    "gravitar-ram": replace(
        GRAVITAR,
        preset="gravitar-ram",
        env=EnvSettings(obs_type="ram", num_envs=64),
        agent=DQNSettings(buffer_size=1_000_000, batch_size=512, train_frequency=64, gradient_steps=2),
    ),
    "cartpole": replace(
        GRAVITAR,
        preset="cartpole",
        env=EnvSettings(id="CartPole-v1", num_envs=4),
        agent=DQNSettings(
            network="notebook",
            policy="online",
            buffer_size=50_000,
            learning_starts=1_000,
            batch_size=256,
            train_frequency=2,
            target_network_frequency=500,
            tau=1.0,
            learning_rate=2.5e-4,
            adam_epsilon=1e-8,
            gamma=0.99,
            n_step=3,
            reward_scale=0.1,
            epsilon_end=0.02,
            epsilon_decay=5_000,
            epsilon_ladder=0.0,
        ),
        total_steps=300_000,
        precision="fp32",
    ),
    "notebook": replace(
        GRAVITAR,
        preset="notebook",
        env=EnvSettings(id="Gravitar-v0", num_envs=1),
        agent=DQNSettings(
            network="notebook",
            policy="online",
            buffer_size=50_000,
            learning_starts=2_000,
            stack_padding="repeat",
            batch_size=128,
            clock="episodes",
            train_frequency=1,
            gradient_steps=10,
            target_network_frequency=100,
            tau=1.0,
            learning_rate=1e-4,
            adam_epsilon=1e-8,
            gamma=0.99,
            max_grad_norm=0.0,
            n_step=1,
            double_q=False,
            reward_scale=1 / 500,
            time_limit_is_terminal=True,
            epsilon_start=0.5,
            epsilon_end=0.02,
            epsilon_decay=960,  # 0.48 at 1/2000 an episode
            epsilon_ladder=0.0,
        ),
        rnd=RNDSettings(coef=1 / 500, variant="notebook", update_frequency=1),
        precision="fp32",
    ),
    "randal": RANDAL_PRESET,
    "ppo": PPO,
    "ppo-rnd": replace(PPO, preset="ppo-rnd", rnd=PPORNDSettings()),
    "randal-cartpole": replace(
        RANDAL_PRESET,
        preset="randal-cartpole",
        env=EnvSettings(id="CartPole-v1", num_envs=16),
        agent=replace(
            PUBLISHED_PPO,
            num_steps=32,
            learning_rate=1e-3,
            learning_rate_end=0.0,
            learning_rate_decay=200_000,
            gamma=0.99,
            clip_coef=0.2,
            ent_coef=0.01,
            reward_scale=0.1,
        ),
        rnd=PPORNDSettings(coef=0.5, init_steps=250, init_updates=0),
        tasks=TaskSettings(pixel_control=0.0, reward_prediction=1.0, value_replay=1.0),
        total_steps=200_000,
        precision="fp32",
    ),
}


def get_preset(name: str) -> RunConfig:
    """The preset called `name`; UserError names the nearest one otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    if (Path(name) / "config.json").exists():
        raise UserError(f"{name} is a run's folder, not a preset: --resume {name} goes on with it")
    raise UserError(f"unknown preset {name!r}: {did_you_mean(name, PRESETS)}there are {', '.join(PRESETS)}")


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that `to_dict` returned; UserError names an unknown or ill-typed setting.

    What is newer than the table is as in today's preset.
    """
    if not isinstance(values, Mapping):
        raise UserError("setting config is not a table of settings")
    if "preset" not in values:
        raise UserError("setting preset is missing: was it written by another version?")
    return typing.cast(RunConfig, build(PRESETS.get(str(values["preset"]), GRAVITAR), values))
