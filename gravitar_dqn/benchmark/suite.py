"""How fast it is, and against what: in alternation within one run, as medians, quartiles and ratios."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.benchmark.contenders import (
    BATCH,
    STEPS,
    UPDATES,
    BareEmulator,
    NetworksAlone,
    Ours,
    actor_critic_config,
    our_config,
)
from gravitar_dqn.benchmark.measure import Row, milliseconds, rows_of, table
from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.benchmark.peers import Notebook, StableBaselines, StablePPO
from gravitar_dqn.benchmark.scale import scale_rows
from gravitar_dqn.benchmark.worker import Maker, take_turns
from gravitar_dqn.envs.spec import EnvSpec
from gravitar_dqn.errors import UserError
from gravitar_dqn.replay import ReplayBuffer
from gravitar_dqn.run.folder import commit, versions
from gravitar_dqn.runtime.execution import choose_device, describe_device, keep_freed_memory
from gravitar_dqn.runtime.memory import available_bytes, bytes_per_transition

log = logging.getLogger(__name__)

FRAME = (84, 84)
NUM_ACTIONS = 18
INSTALL_PEERS = ".venv/bin/pip install -c scripts/constraints.txt -e '.[bench]'"


def make_agent(settings: BenchConfig, device: torch.device, **changes: Any) -> DQNAgent:
    """An agent of the benchmark's settings, its replay buffer filled with noise."""
    config = replace(our_config(settings.device, settings.num_envs), **changes)
    torch.manual_seed(config.seed)
    agent = DQNAgent(config, EnvSpec(FRAME, torch.uint8, NUM_ACTIONS), device)
    fill(agent.replay, 3 * settings.num_envs * 8, agent.observe, agent.begin)
    return agent


def fill(buffer: ReplayBuffer, transitions: int, put: Callable[..., None], begin: Callable[..., None]) -> None:
    """Play random frames into a buffer, with a game's end now and then."""
    random = np.random.default_rng(0)
    num_envs = buffer.num_envs
    frames = random.integers(0, 255, (8, num_envs, *buffer.frame_shape), dtype=np.uint8)
    begin(frames[0])
    no = np.zeros(num_envs, dtype=np.bool_)
    played = ~no
    for i in range(-(-transitions // num_envs)):
        actions = torch.from_numpy(random.integers(0, NUM_ACTIONS, num_envs)).to(buffer.device)
        ends = (random.random(num_envs) < 1 / 600) & played
        put(actions, random.normal(size=num_envs), ends, no, frames[i % 8], played)
        played = ~ends


def network_rows(settings: BenchConfig, device: torch.device) -> list[Row]:
    """Acting, curiosity and one gradient step: as it runs, and eager fp32."""
    agents = {
        "fp32, eager": make_agent(settings, device, precision="fp32", execution="eager"),
        "as it runs": make_agent(settings, device),
    }
    rows = []
    envs, samples = f"ms for {settings.num_envs} environments", f"ms for {BATCH} samples"
    for section, unit, name in (
        ("acting", envs, "act"),
        ("curiosity of a step", envs, "compute_int_rewards"),
        ("update of the Q network", samples, "update_q_network"),
        ("update of the predictor", samples, "update_predictor"),
    ):
        log.info(f"  {section}")
        functions = {key: getattr(agent, name) for key, agent in agents.items()}
        rows += rows_of(section, unit, milliseconds(functions, settings.rounds), "fp32, eager")
    return rows


def replay_rows(settings: BenchConfig, device: torch.device) -> list[Row]:
    """Storing and sampling by the number of frames held, so that growth would show."""
    buffers: dict[str, dict[int, ReplayBuffer]] = {"uniform": {}, "priorities": {}}
    for size in settings.sizes:
        if 2 * size * bytes_per_transition(FRAME, torch.uint8) > 0.8 * available_bytes(device):
            log.info(f"replay: {size} frames twice over do not fit into the memory; left out")
            continue
        log.info(f"  filling buffers of {size:,} frames")
        for kind, exponent in (("uniform", 0.0), ("priorities", 0.5)):
            buffer = ReplayBuffer(size, settings.num_envs, FRAME, n_step=3, priority_exponent=exponent, device=device)
            fill(buffer, size + 20 * settings.num_envs, buffer.put, buffer.begin)
            buffers[kind][size] = buffer
    generator = torch.Generator(device).manual_seed(0)
    frames = np.zeros((settings.num_envs, *FRAME), dtype=np.uint8)
    actions, rewards = torch.zeros(settings.num_envs, dtype=torch.int64, device=device), np.zeros(settings.num_envs)
    no = np.zeros(settings.num_envs, dtype=np.bool_)

    def prioritize(buffer: ReplayBuffer) -> Callable[[], object]:
        positions = torch.nonzero(buffer.sampling_weights.view(-1)).squeeze(1)
        batches = [positions[torch.randint(len(positions), (BATCH,), device=device)] for _ in range(64)]
        turns = itertools.cycle(batches)
        priorities = torch.rand(BATCH, device=device) + 0.1
        return lambda: buffer.update_priorities(next(turns), priorities)

    samples = f"ms for {BATCH} samples"
    operations: dict[str, tuple[str, Callable[[ReplayBuffer], Callable[[], object]]]] = {
        "sample": (samples, lambda buffer: partial(buffer.sample, BATCH, generator)),
        "put": (
            f"ms for {settings.num_envs} environments",
            lambda buffer: partial(buffer.put, actions, rewards, no, no, frames, ~no),
        ),
        "new priorities": (samples, prioritize),
    }
    rows: list[Row] = []
    for (operation, (unit, make)), kind in itertools.product(operations.items(), buffers):
        if not buffers[kind] or (operation, kind) == ("new priorities", "uniform"):
            continue
        log.info(f"  {operation}, {kind}")
        functions = {f"{operation}, {kind}, {size:>9,} frames": make(held) for size, held in buffers[kind].items()}
        rows += rows_of("replay", unit, milliseconds(functions, settings.rounds, 20), next(iter(functions)))
    return rows


def training_rows(settings: BenchConfig) -> list[Row]:
    """Whole training at 1.4 samples a step, against the peers and against our own parts, each alone."""
    plain = "ours, the notebook's targets"
    notebook, library = "the notebook's way", "Stable-Baselines3 DQN, no curiosity"
    emulator, networks, parts = "our parts: the emulator", "our parts: the networks", "our parts, one after the other"
    config = partial(our_config, settings.device, settings.num_envs)
    makers: dict[str, Maker] = {}
    if settings.peers:
        makers[notebook] = partial(Notebook, settings.device)
        if importlib.util.find_spec("stable_baselines3") is not None:
            makers[library] = partial(StableBaselines, settings.device)
        else:
            log.warning(f"Stable-Baselines3 is not installed and left out; {INSTALL_PEERS} brings it")
    makers[plain] = partial(Ours, config(plain=True))
    if not settings.quick:
        like_library = partial(config, plain=True, curious=False, max_grad_norm=10.0)
        makers["ours, the gravitar preset's targets"] = partial(Ours, config())
        makers["ours, the notebook's targets, no curiosity"] = partial(Ours, like_library())
        makers["the same, eager fp32"] = partial(Ours, like_library(fast=False))
    makers[emulator] = partial(BareEmulator, config())
    makers[networks] = partial(NetworksAlone, config(plain=True))
    speeds = speeds_of(makers, settings)
    speeds[parts] = [1 / (1 / one + 1 / two) for one, two in zip(speeds[emulator], speeds[networks], strict=True)]

    rows = rows_of("training", "steps/s", speeds, notebook if settings.peers else plain)
    if library in speeds:
        mine = {name: values for name, values in speeds.items() if name in (library, plain) or "fp32" in name}
        mine |= {name: values for name, values in speeds.items() if name.endswith("no curiosity")}
        rows += rows_of("training, against Stable-Baselines3", "steps/s", mine, library)
    whole = {name: speeds[name] for name in (parts, plain)}
    return rows + rows_of("training, as a share of its parts", "steps/s", whole, parts)


def actor_critic_rows(settings: BenchConfig) -> list[Row]:
    """Whole training of RANDAL, of PPO with curiosity and of plain PPO, against Stable-Baselines3's PPO."""
    config = partial(actor_critic_config, settings.device)
    library = "Stable-Baselines3 PPO, no curiosity"
    makers: dict[str, Maker] = {}
    if settings.peers and importlib.util.find_spec("stable_baselines3") is not None:
        makers[library] = partial(StablePPO, config())
    makers["ours, PPO without curiosity"] = partial(Ours, config(curious=False, tasks=False))
    makers["ours, PPO with curiosity"] = partial(Ours, config(tasks=False))
    makers["ours, randal"] = partial(Ours, config())
    return rows_of("actor-critics, 32 games", "steps/s", speeds_of(makers, settings), next(iter(makers)))


def speeds_of(makers: dict[str, Maker], settings: BenchConfig) -> dict[str, list[float]]:
    """Steps per second of every contender, round by round."""
    turns = take_turns({name: [make] for name, make in makers.items()}, settings)
    return {name: [speed for speed, _ in found] for name, found in turns.items()}


def run(settings: BenchConfig) -> dict[str, Any]:
    """Measure everything, print the table, give (and write) the record."""
    if settings.quick:
        settings = replace(
            settings,
            num_envs=min(settings.num_envs, 32),  # 128 games take long to start
            rounds=min(settings.rounds, 2),
            seconds=min(settings.seconds, 1.5),
            sizes=tuple(size for size in settings.sizes if size <= 100_000),
        )
    device = choose_device(settings.device)
    if settings.json is not None and (settings.json.is_dir() or not settings.json.parent.is_dir()):
        raise UserError(f"--json: {settings.json} cannot be written: it is a folder, or its folder does not exist")
    keep_freed_memory()
    start = time.perf_counter()
    rows: list[Row] = []
    sections: dict[str, Callable[[], list[Row]]] = {
        "whole training": lambda: training_rows(settings),
        "actor-critics": lambda: actor_critic_rows(settings),
        "scale": lambda: scale_rows(settings),
        "networks": lambda: network_rows(settings, device),
        "replay": lambda: replay_rows(settings, device),
    }
    if settings.quick:
        del sections["actor-critics"], sections["scale"]
    for i, (title, measure) in enumerate(sections.items()):
        log.info(f"measuring {i + 1} of {len(sections)}: {title} (after {time.perf_counter() - start:.0f} s)")
        rows += measure()
    record = {
        "machine": describe_device(device),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "settings": asdict(settings),
        "samples_per_step": BATCH * UPDATES / STEPS,
        "seconds": time.perf_counter() - start,
        "rows": [row.summary() | {"values": row.values} for row in rows],
    }
    print(f"{record['machine']}, {record['cores']} cores, commit {record['commit']}, {record['seconds']:.0f} s")
    print(table(rows))
    if settings.json is not None:
        settings.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return record
