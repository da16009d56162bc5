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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.benchmark import contenders
from gravitar_dqn.benchmark.measure import Row, alternate, milliseconds, rows_of, table
from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.benchmark.peers import Notebook, StableBaselines, StablePPO
from gravitar_dqn.benchmark.scale import scale_rows
from gravitar_dqn.benchmark.worker import Worker, workers
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
    config = replace(contenders.our_config(settings.device, settings.num_envs), **changes)
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
    envs, samples = f"ms for {settings.num_envs} environments", f"ms for {contenders.BATCH} samples"
    for section, unit, name in (
        ("acting", envs, "act"),
        ("curiosity of a step", envs, "compute_int_rewards"),
        ("update of the Q network", samples, "update_q_network"),
        ("update of the predictor", samples, "update_predictor"),
    ):
        log.info(f"  {section}")
        measured = {key: milliseconds(getattr(agent, name), device) for key, agent in agents.items()}
        rows += rows_of(section, unit, alternate(measured, settings.rounds), "fp32, eager")
    return rows


def replay_rows(settings: BenchConfig, device: torch.device) -> list[Row]:
    """Storing and sampling by the number of frames held, so that growth would show."""
    buffers: dict[int, dict[str, ReplayBuffer]] = {}
    for size in settings.sizes:
        if 2 * size * bytes_per_transition(FRAME, torch.uint8) > 0.8 * available_bytes(device):
            log.info(f"replay: {size} frames twice over do not fit into the memory; left out")
            continue
        log.info(f"  filling buffers of {size:,} frames")
        buffers[size] = {}
        for name, exponent in (("uniform", 0.0), ("priorities", 0.5)):
            buffer = ReplayBuffer(size, settings.num_envs, FRAME, n_step=3, priority_exponent=exponent, device=device)
            fill(buffer, size + 20 * settings.num_envs, buffer.put, buffer.begin)
            buffers[size][name] = buffer
    generator = torch.Generator(device).manual_seed(0)

    def sample(buffer: ReplayBuffer) -> Callable[[], object]:
        return lambda: buffer.sample(contenders.BATCH, generator)

    def put(buffer: ReplayBuffer) -> Callable[[], object]:
        actions = torch.zeros(settings.num_envs, dtype=torch.int64, device=device)
        frames = np.zeros((settings.num_envs, *FRAME), dtype=np.uint8)
        no = np.zeros(settings.num_envs, dtype=np.bool_)
        return lambda: buffer.put(actions, np.zeros(settings.num_envs), no, no, frames, ~no)

    def prioritize(buffer: ReplayBuffer) -> Callable[[], object]:
        positions = torch.nonzero(buffer.sampling_weights.view(-1)).squeeze(1)
        batches = [positions[torch.randint(len(positions), (contenders.BATCH,), device=device)] for _ in range(64)]
        turns = itertools.cycle(batches)
        priorities = torch.rand(contenders.BATCH, device=device) + 0.1
        return lambda: buffer.update_priorities(next(turns), priorities)

    rows: list[Row] = []
    for operation, make, unit in (
        ("sample", sample, f"ms for {contenders.BATCH} samples"),
        ("put", put, f"ms for {settings.num_envs} environments"),
        ("new priorities", prioritize, f"ms for {contenders.BATCH} samples"),
    ):
        for kind in ("uniform", "priorities"):
            if (operation == "new priorities" and kind == "uniform") or not buffers:
                continue
            log.info(f"  {operation}, {kind}")
            measured = {
                f"{operation}, {kind}, {size:>9,} frames": milliseconds(make(pair[kind]), device, 20)
                for size, pair in buffers.items()
            }
            rows += rows_of("replay", unit, alternate(measured, settings.rounds), next(iter(measured)))
    return rows


def training_rows(settings: BenchConfig) -> list[Row]:
    """Whole training at 1.4 samples a step, against the peers and against our own parts, each alone."""

    def ours(**kind: Any) -> tuple[Any, ...]:
        return (contenders.Ours, contenders.our_config(settings.device, settings.num_envs, **kind))

    plain = "ours, the notebook's targets"
    notebook, library = "the notebook's way", "Stable-Baselines3 DQN, no curiosity"
    emulator, networks, parts = "our parts: the emulator", "our parts: the networks", "our parts, one after the other"
    makers: dict[str, tuple[Any, ...]] = {}
    if settings.peers:
        makers[notebook] = (Notebook, settings.device)
        if importlib.util.find_spec("stable_baselines3") is not None:
            makers[library] = (StableBaselines, settings.device)
        else:
            log.warning(f"Stable-Baselines3 is not installed and left out; {INSTALL_PEERS} brings it")
    makers[plain] = ours(plain=True)
    if not settings.quick:
        makers["ours, the gravitar preset's targets"] = ours()
        makers["ours, the notebook's targets, no curiosity"] = ours(plain=True, curious=False, max_grad_norm=10.0)
        makers["the same, eager fp32"] = ours(plain=True, curious=False, max_grad_norm=10.0, fast=False)
    makers[emulator] = (contenders.BareEmulator, ours()[1])
    makers[networks] = (contenders.NetworksAlone, ours(plain=True)[1])
    speeds = take_turns(makers, settings)
    speeds[parts] = [1 / (1 / one + 1 / two) for one, two in zip(speeds[emulator], speeds[networks], strict=True)]

    unit = "steps/s"
    rows = rows_of("training", unit, speeds, notebook if settings.peers else plain, higher_is_better=True)
    if library in speeds:
        mine = {name: values for name, values in speeds.items() if name in (library, plain) or "fp32" in name}
        mine |= {name: values for name, values in speeds.items() if name.endswith("no curiosity")}
        rows += rows_of("training, against Stable-Baselines3", unit, mine, library, higher_is_better=True)
    whole = {name: speeds[name] for name in (parts, plain)}
    return rows + rows_of("training, as a share of its parts", unit, whole, parts, higher_is_better=True)


def actor_critic_rows(settings: BenchConfig) -> list[Row]:
    """Whole training of RANDAL, of PPO with curiosity and of plain PPO, against Stable-Baselines3's PPO."""

    def ours(**kind: Any) -> tuple[Any, ...]:
        return (contenders.Ours, contenders.actor_critic_config(settings.device, **kind))

    plain, library = "ours, PPO without curiosity", "Stable-Baselines3 PPO, no curiosity"
    makers: dict[str, tuple[Any, ...]] = {}
    if settings.peers and importlib.util.find_spec("stable_baselines3") is not None:
        makers[library] = (StablePPO, contenders.actor_critic_config(settings.device))
    makers[plain] = ours(curious=False, tasks=False)
    makers["ours, PPO with curiosity"] = ours(tasks=False)
    makers["ours, randal"] = ours()
    speeds = take_turns(makers, settings)
    reference = library if library in speeds else plain
    return rows_of("actor-critics, 32 games", "steps/s", speeds, reference, higher_is_better=True)


def take_turns(makers: dict[str, tuple[Any, ...]], settings: BenchConfig) -> dict[str, list[float]]:
    """Steps per second of every contender, round by round."""

    def announce(i: int) -> None:  # between turns: nobody plays meanwhile
        log.info(f"  round {i + 1} of {settings.rounds}: {len(makers)} turns of {settings.seconds:g} s or more")

    def turn(worker: Worker) -> Callable[[], float]:
        return lambda: worker.turn(settings.seconds)

    with workers(makers) as contenders:
        return alternate({worker.name: turn(worker) for worker in contenders}, settings.rounds, announce)


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
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "samples_per_step": contenders.BATCH * contenders.UPDATES / contenders.STEPS,
        "seconds": time.perf_counter() - start,
        "rows": [row.summary() | {"values": row.values} for row in rows],
    }
    print(f"{record['machine']}, {record['cores']} cores, commit {record['commit']}, {record['seconds']:.0f} s")
    print(table(rows))
    if settings.json is not None:
        settings.json.write_text(json.dumps(record, indent=1) + "\n")
    return record
