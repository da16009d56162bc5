"""Checkpoints: atomic, complete, and read without trusting them.

A file appears whole or not at all; `latest` is a link that is replaced in one step. So a kill at any moment leaves
the previous checkpoint whole.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from gravitar_dqn.errors import UserError
from gravitar_dqn.files import written_whole

FORMAT = 3  # 2 had other names in the replay buffer; 1 the features of convolutions in another order
READABLE = (2, FORMAT)  # without a replay buffer, and but for DQN's curiosity, 2 holds the same


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def save(run_dir: Path, state: dict[str, Any], global_step: int, keep: int = 2) -> Path:
    """Write `state` as the newest checkpoint; OSError (a full disk, say) leaves the previous one as it was.

    The newest `keep` checkpoints stay, this one among them.
    """
    home = folder(run_dir)
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"step_{global_step:012d}.pt"
    try:
        with written_whole(path) as temporary:
            torch.save({"format": FORMAT, **state}, temporary)
        _point_to(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise OSError(f"checkpoint not written: {error}") from error
    others = sorted(old for old in home.glob("step_*.pt") if old != path)
    earlier = [old for old in others if old < path]  # later ones were left by a kill before `latest` named them
    for old in set(others) - set(earlier[max(0, len(earlier) + 1 - keep) :]):
        old.unlink(missing_ok=True)
    for torn in home.glob("step_*.tmp"):  # left by a kill
        torn.unlink(missing_ok=True)
    return path


def _point_to(path: Path) -> None:
    """Let `latest` be this checkpoint."""
    link = path.with_name("latest.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name("latest"))


def mend(run_dir: Path) -> None:
    """Make `latest` again after a copy of the run's folder, which may have lost the link or made a file of it."""
    paths = sorted(folder(run_dir).glob("step_*.pt"))
    if paths and not ((link := folder(run_dir) / "latest").is_symlink() and link.exists()):
        _point_to(paths[-1])


def load(run_dir: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The newest checkpoint's state; UserError when there is none, or when it is cut short or not ours."""
    path = folder(run_dir) / "latest"
    if not path.exists():
        raise UserError(f"{run_dir} has no checkpoint yet: start the run again in another folder")
    return read(path.resolve(), device)


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint file; UserError when it is cut short or not ours."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's word on files that are not its own
            state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # its reader fails in many ways, IndexError and struct.error among them
        others = [str(p) for p in sorted(path.parent.glob("step_*.pt")) if p != path]
        hint = f"; {others[-1]} is the one before it" if others else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint ({reason}){hint}") from None
    if not isinstance(state, dict) or state.get("format") not in READABLE:
        raise UserError(f"{path} is not a checkpoint of this program (formats {READABLE[0]} and {FORMAT})")
    agent = state.get("agent")
    if isinstance(agent, dict) and "curiosity" in agent:  # its name in format 2
        agent["rnd"] = agent.pop("curiosity")
    return state
