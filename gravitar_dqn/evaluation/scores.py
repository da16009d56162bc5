"""Evaluation: whole games with a fixed policy, raw scores, and the statistics that are quoted."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from gravitar_dqn.config import RunConfig
from gravitar_dqn.envs import make_envs, spec_of
from gravitar_dqn.envs.spec import frames_per_step, is_atari
from gravitar_dqn.errors import Interrupted
from gravitar_dqn.evaluation.acting import Policy, load_policy, play_games
from gravitar_dqn.evaluation.trained_agent import Trained
from gravitar_dqn.runtime.clock import Every

log = logging.getLogger(__name__)

SAY_EVERY, SHOW_EVERY = 30.0, 1.0  # seconds
RANDOM_SCORE, HUMAN_SCORE = 173.0, 3351.4  # Gravitar, the usual constants of human-normalized scores


def interquartile_mean(scores: npt.NDArray[np.float64]) -> float:
    """Mean of the middle half, edge values weighted by their share (Agarwal 2021)."""
    ordered = np.sort(scores)
    edges = np.clip(np.arange(len(ordered) + 1) / len(ordered), 0.25, 0.75)
    return float((np.diff(edges) * ordered).sum() / 0.5)


def bootstrap_interval(scores: npt.NDArray[np.float64], seed: int, resamples: int = 2_000) -> tuple[float, float]:
    """95 % bootstrap interval of the interquartile mean."""
    rng = np.random.default_rng(seed)
    draws = rng.choice(scores, size=(resamples, len(scores)))
    low, high = np.quantile([interquartile_mean(draw) for draw in draws], [0.025, 0.975])
    return float(low), float(high)


def summarize(
    scores: list[float], config: RunConfig, *, epsilon: float, seed: int, global_step: int, max_steps: int = 0
) -> dict[str, Any]:
    """The contents of eval.json."""
    array = np.array(scores)
    compared = "gravitar" in config.env.id.lower() and not max_steps
    atari = is_atari(gym.spec(config.env.id))
    return {
        "episodes": len(scores),
        "epsilon": epsilon,
        "sticky_actions": config.env.sticky_actions if atari else None,
        "frames_trained": global_step * frames_per_step(config.env),
        "mean": float(array.mean()),
        "std": float(array.std()),
        "median": float(np.median(array)),
        "iqm": interquartile_mean(array),
        "iqm_ci95": list(bootstrap_interval(array, seed)),
        "human_normalized": float((array.mean() - RANDOM_SCORE) / (HUMAN_SCORE - RANDOM_SCORE)) if compared else None,
        "returns": scores,
    } | ({"max_steps": max_steps} if max_steps else {})


class Progress:
    """Games played so far and their mean: a bar at a terminal, elsewhere a line of the log every half minute.

    Steps are shown too: games that an idle agent plays side by side all end together, after minutes.
    """

    def __init__(self, episodes: int) -> None:
        self._scores: list[float] = []
        self._episodes, self._steps = episodes, 0
        self._start = time.monotonic()
        self._bar = tqdm(total=episodes, unit=" games", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)
        self._bar.refresh()
        self._every = Every(SAY_EVERY if self._bar.disable else SHOW_EVERY)

    def add(self, score: float) -> None:
        """Another game has ended."""
        self._scores.append(score)
        self._bar.update()

    def step(self) -> None:
        """Every game has gone a step on."""
        self._steps += 1
        if not self._every.due(time.monotonic() - self._start):
            return
        mean = f"mean score {np.mean(self._scores):,.1f}, " if self._scores else ""
        state = f"{mean}{self._steps:,} steps in each environment"
        if self._bar.disable:
            log.info("%d of %d games, %s", len(self._scores), self._episodes, state)
        else:
            self._bar.set_postfix_str(state)

    def close(self) -> None:
        """Take the bar away: the table follows."""
        self._bar.close()


def evaluate(
    trained: Trained,
    *,
    episodes: int,
    epsilon: float,
    seed: int,
    device: torch.device,
    max_steps: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Play `episodes` whole games; returns eval.json's contents.

    Games are cut off after `max_steps` agent steps, where that is not 0. After `interrupted` it is what the games say
    that had ended by then; UserError when there is none.
    """
    config = trained.config
    network = load_policy(config, trained.weights, device)
    envs = make_envs(dataclasses.replace(config.env, num_envs=min(episodes, 32)))
    policy = Policy(config, network, spec_of(envs), envs.num_envs, epsilon=epsilon, seed=seed)
    with contextlib.closing(envs), contextlib.closing(Progress(episodes)) as progress:
        limit = max_steps or math.inf
        scores = play_games(envs, policy, episodes, seed, limit, interrupted, progress.add, progress.step)
    if not scores:
        raise Interrupted("stopped before a game had ended: nothing is known of the scores")
    return summarize(scores, config, epsilon=epsilon, seed=seed, global_step=trained.global_step, max_steps=max_steps)


def table(result: dict[str, Any]) -> str:
    """The statistics as lines for a terminal."""
    low, high = result["iqm_ci95"]
    rows = [
        ("games", f"{result['episodes']}"),
        ("epsilon", f"{result['epsilon']:g}"),
        ("frames trained", f"{result['frames_trained']:,}"),
        ("mean", f"{result['mean']:.1f}"),
        ("standard deviation", f"{result['std']:.1f}"),
        ("median", f"{result['median']:.1f}"),
        ("interquartile mean", f"{result['iqm']:.1f}  (95 % interval {low:.1f} to {high:.1f})"),
    ]
    if result["human_normalized"] is not None:
        rows.append(("human-normalized", f"{100 * result['human_normalized']:.1f} %"))
    return "\n".join(f"{name:<20} {value}" for name, value in rows)
