"""What the benchmark is asked for. Loads no agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gravitar_dqn.config import bounded


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmark is asked for."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_envs: int = bounded(128, low=1)
    """Games that we play side by side."""
    rounds: int = bounded(10, low=1)
    """Turns that each contender of a comparison gets."""
    seconds: float = bounded(8.0, low=0.01, high=3_600)
    """Length of a turn of whole training; a contender finishes what it has begun."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Frames in the replay buffer; those that do not fit are left out."""
    peers: bool = True
    """Also the notebook's way and, where it is installed (extra `bench`), Stable-Baselines3."""
    quick: bool = False
    """Everything short, and less of it: two minutes instead of about twenty, on two quiet cores."""
    json: Path | None = None
    """Write the figures to this file."""
