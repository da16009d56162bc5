"""What more ranks bring: whole training at constant work per rank, and at constant work in all."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from dataclasses import replace

import torch

from gravitar_dqn.benchmark import contenders
from gravitar_dqn.benchmark.measure import Row, rows_of
from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.benchmark.worker import Maker, take_turns
from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import choose_device
from gravitar_dqn.runtime.processes import available_cores


class RankOfOurs(contenders.Ours):
    """`Ours` as one of several ranks, which the benchmark starts as torchrun would."""

    def __init__(self, config: DQNRunConfig, rank: int, ranks: int, port: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        self._joined = contextlib.ExitStack()
        self._joined.enter_context(distributed.joined(config))
        super().__init__(config)  # with games of its own


def ranks_of(config: DQNRunConfig, ranks: int) -> list[Maker]:
    """The makers of a run on so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [functools.partial(RankOfOurs, config, rank, ranks, port) for rank in range(ranks)]


def counts(device: str) -> list[int]:
    """1, 2, 4, ... ranks, as many as there are GPUs or, without one, cores; 8 at most."""
    most = torch.cuda.device_count() if choose_device(device).type == "cuda" else len(available_cores())
    most = 1 if device.startswith("cuda:") else most
    return [n for n in (1, 2, 4, 8) if n <= most]


def grown(config: DQNRunConfig, ranks: int) -> DQNRunConfig:
    """The settings with which each of `ranks` does what one process does with `config`."""
    agent = replace(
        config.agent,
        batch_size=config.agent.batch_size * ranks,
        buffer_size=config.agent.buffer_size * ranks,
        train_frequency=config.agent.train_frequency * ranks,
    )
    return replace(config, env=replace(config.env, num_envs=config.env.num_envs * ranks), agent=agent)


def scale_rows(settings: BenchConfig) -> list[Row]:
    """Steps per second of 1, 2, ... ranks, each with an equal share of the cores, and what they wait for each other."""
    numbers = counts(settings.device)
    threads = max(1, len(available_cores()) // numbers[-1])
    config = contenders.our_config(settings.device, min(settings.num_envs, 32), curious=False)
    config = replace(config, threads=threads, env=replace(config.env, num_threads=threads), rank_timeout=3_600.0)
    config = replace(config, execution="eager")  # as several ranks run
    games, batch = config.env.num_envs, config.agent.batch_size
    one = f"1 rank, {games} games"
    makers = {one: ranks_of(config, 1)}
    for n in (n for n in numbers[1:] if games % n == 0):
        makers[f"{n} ranks, {games * n} games, batch {n * batch}"] = ranks_of(grown(config, n), n)
        makers[f"{n} ranks, {games} games in all, batch {batch}"] = ranks_of(config, n)
    turns = take_turns(makers, settings)
    speeds = {name: [speed for speed, _ in found] for name, found in turns.items()}
    waits = {name: [100 * waited for _, waited in found] for name, found in turns.items() if name != one}
    rows = rows_of("scale", "steps/s of all ranks", speeds, one)
    return rows + [Row("scale, waiting for other ranks", name, "% of the time", found) for name, found in waits.items()]
