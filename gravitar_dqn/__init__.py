"""Learns to play Atari's Gravitar: a duelling DQN, and RANDAL, PPO with auxiliary tasks; both with curiosity (RND).

The public names below are imported when they are asked for: settings and the command line need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "gravitar_dqn.agent": ("DQNAgent",),
    "gravitar_dqn.randal.agent": ("PPOConfig", "RANDAL"),
    "gravitar_dqn.randal.networks": ("MLP", "NatureCNN", "PPOIntrinsic", "PredictorCNN", "PredictorMLP"),
    "gravitar_dqn.randal.trainer": ("GAE", "NSTEP", "RANDALTrainer", "RANDALTrainerConfig"),
    "gravitar_dqn.rnd": ("RewardForwardFilter", "RunningMeanStd"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
