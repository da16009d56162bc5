"""Agents as they are after training: from a run's folder, or from the weights that ship with the package.

Shipped weights are those of the network that acts, in float16; the settings of their run, the steps it played and
what it was are in the file's header. `python -m gravitar_dqn.evaluation.trained_agent RUN_DIR NAME` makes such a file
of a run; PATH.safetensors instead of NAME puts it elsewhere.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gravitar_dqn.config import RunConfig, to_dict
from gravitar_dqn.errors import UserError, did_you_mean
from gravitar_dqn.presets import PRETRAINED, from_dict
from gravitar_dqn.run import checkpoint
from gravitar_dqn.run.files import written_whole
from gravitar_dqn.run.folder import load_run

KEY = "trained"  # one entry of the file's header holds all, since the order of several is left to chance


@dataclass(frozen=True)
class Trained:
    """An agent that can play."""

    name: str  # of its run's folder, or of the shipped weights
    config: RunConfig  # of the run that trained it
    weights: dict[str, Tensor]  # of the network that acts
    global_step: int  # agent steps it was trained for
    state: dict[str, Any] | None  # all of the agent in its checkpoint; None for shipped weights and older formats


def from_run(run_dir: Path, which: str | Path = "latest") -> Trained:
    """A run's agent as of a checkpoint: its newest one, `latest`, or the one that `checkpoint.find` finds."""
    config = load_run(run_dir)
    saved = checkpoint.load(run_dir) if which == "latest" else checkpoint.read(checkpoint.find(run_dir, which))
    state = saved["agent"]
    whole = state if saved["format"] == checkpoint.FORMAT else None  # an older one's curiosity has other layers
    return Trained(run_dir.resolve().name, config, state["policy"], state["clocks"]["global_step"], whole)


def names() -> list[str]:
    """What ships with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def from_pretrained(name: str) -> Trained:
    """Weights that ship with the package; UserError names what there is."""
    if name not in names():
        there = ", ".join(names()) or "none yet"
        raise UserError(f"no pretrained agent {name!r}: {did_you_mean(name, names())}there are {there}")
    return read(PRETRAINED / f"{name}.safetensors")


def read(path: Path) -> Trained:
    """A file that `write` made; UserError when it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[KEY])
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (it is no dict)
        return Trained(path.stem, from_dict(header["config"]), weights, int(header["global_step"]), None)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold a trained agent: {str(error).splitlines()[0]}") from None


def write(trained: Trained, path: Path) -> None:
    """The weights in float16 and what they are, as one file; the same agent makes the same bytes."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in trained.weights.items()}
    header = {"run": trained.name, "global_step": trained.global_step, "config": to_dict(trained.config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(weights, temporary, metadata={KEY: json.dumps(header)})
        temporary.chmod(0o644)  # safetensors makes it for its owner alone


def main(argv: list[str]) -> int:
    """`RUN_DIR NAME`: put a run's agent among those that ship; `RUN_DIR PATH.safetensors`: into a file."""
    if len(argv) != 2:
        print("usage: python -m gravitar_dqn.evaluation.trained_agent RUN_DIR NAME|PATH.safetensors", file=sys.stderr)
        return 2
    path = Path(argv[1]) if argv[1].endswith(".safetensors") else PRETRAINED / f"{argv[1]}.safetensors"
    try:
        write(from_run(Path(argv[0])), path)
        print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
