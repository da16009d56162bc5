"""How stable a policy is: the mean scores of checkpoints from the last sixth of a run's training time.

The policy that a run happens to end with may be better or worse than the one a minute earlier; a single evaluation
cannot show that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gravitar_dqn import checkpoint
from gravitar_dqn.errors import UserError
from gravitar_dqn.evaluation import evaluate
from gravitar_dqn.files import write_json
from gravitar_dqn.sweep_plan import LAST_PART
from gravitar_dqn.trained import from_run


def choose(run_dir: Path, count: int) -> list[Path]:
    """`count` checkpoints evenly spaced over the last sixth of the training time, oldest first; fewer where they lack.

    The newest is not among them: that is the one which `evaluate` plays.
    """
    newest = checkpoint.folder(run_dir) / "latest"
    end = _wall_seconds(newest)
    paths = [path for path in checkpoint.folder(run_dir).glob("step_*.pt") if path.name != newest.resolve().name]
    seconds = {path: _wall_seconds(path) for path in paths}
    spacing = end * LAST_PART / count
    chosen: dict[Path, None] = {}
    for i in range(count, 0, -1):
        target = end - i * spacing
        near = [path for path in seconds if abs(seconds[path] - target) <= spacing / 2]
        chosen |= dict.fromkeys(sorted(near, key=lambda path: abs(seconds[path] - target))[:1])
    return list(chosen)


def _wall_seconds(path: Path) -> float:
    return float(checkpoint.read(path.resolve())["tracker"]["wall_seconds"])


def evaluate_snapshots(
    run_dir: Path, count: int, *, episodes: int, epsilon: float, seed: int, device: torch.device
) -> dict[str, Any]:
    """Play `episodes` games with each checkpoint that `choose` finds; writes and returns snapshots.json's contents.

    Returns:
        `minutes`, `global_step` and `mean`, a list each, an item a checkpoint; `episodes` and `epsilon`. UserError when
        the run kept no such checkpoints.
    """
    paths = choose(run_dir, count)
    if not paths:
        raise UserError(
            f"{run_dir} kept no checkpoints of its last sixth: train with a higher --keep-checkpoints "
            "and fewer --checkpoint-minutes"
        )
    result: dict[str, Any] = {"episodes": episodes, "epsilon": epsilon, "minutes": [], "global_step": [], "mean": []}
    for path in paths:
        trained = from_run(run_dir, path)
        scores = evaluate(trained, episodes=episodes, epsilon=epsilon, seed=seed, device=device)
        result["mean"].append(scores["mean"])
        result["minutes"].append(round(_wall_seconds(path) / 60, 3))
        result["global_step"].append(trained.global_step)
    write_json(run_dir / "snapshots.json", result)
    return result


def table(result: dict[str, Any]) -> str:
    """The statistics as lines for a terminal."""
    means = result["mean"]
    lines = [
        f"after {minutes:7.1f} minutes  {mean:.1f}" for minutes, mean in zip(result["minutes"], means, strict=True)
    ]
    return "\n".join(
        [*lines, f"{len(means)} snapshots: mean {np.mean(means):.1f}, {min(means):.1f} to {max(means):.1f}"]
    )
