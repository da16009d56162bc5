"""Learns to play Atari's Gravitar: a duelling DQN, and RANDAL, PPO with auxiliary tasks; both with curiosity (RND).

The public names below are imported when they are asked for: settings and the command line need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gravitar_dqn.agents.dqn import DQNAgent
    from gravitar_dqn.encoders import MLP, NatureCNN
    from gravitar_dqn.evaluation.player import Player, load_agent
    from gravitar_dqn.networks import PredictorCNN, PredictorMLP
    from gravitar_dqn.randal.interface import RANDAL, PPOConfig, PPOIntrinsic
    from gravitar_dqn.randal.trainer import GAE, NSTEP, RANDALTrainer, RANDALTrainerConfig
    from gravitar_dqn.rnd import RewardForwardFilter, RunningMeanStd

_HOMES = {
    "gravitar_dqn.agents.dqn": ("DQNAgent",),
    "gravitar_dqn.encoders": ("MLP", "NatureCNN"),
    "gravitar_dqn.evaluation.player": ("Player", "load_agent"),
    "gravitar_dqn.networks": ("PredictorCNN", "PredictorMLP"),
    "gravitar_dqn.randal.interface": ("PPOConfig", "PPOIntrinsic", "RANDAL"),
    "gravitar_dqn.randal.trainer": ("GAE", "NSTEP", "RANDALTrainer", "RANDALTrainerConfig"),
    "gravitar_dqn.rnd": ("RewardForwardFilter", "RunningMeanStd"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["GAE", "MLP", "NSTEP", "RANDAL", "DQNAgent", "NatureCNN", "PPOConfig", "PPOIntrinsic", "Player"]
__all__ += ["PredictorCNN", "PredictorMLP", "RANDALTrainer", "RANDALTrainerConfig", "RewardForwardFilter"]
__all__ += ["RunningMeanStd", "load_agent"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
