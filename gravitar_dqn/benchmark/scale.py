"""What more ranks bring: whole training at constant work per rank, and at constant work in all."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

from gravitar_dqn.benchmark import contenders
from gravitar_dqn.benchmark.measure import Row, alternate, rows_of
from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.benchmark.worker import Worker
from gravitar_dqn.config import DQNRunConfig
from gravitar_dqn.runtime import distributed
from gravitar_dqn.runtime.execution import choose_device
from gravitar_dqn.runtime.processes import available_cores

log = logging.getLogger(__name__)


class RankOfOurs(contenders.Ours):
    """`Ours` as one of several ranks, which the benchmark starts as torchrun would."""

    def __init__(self, config: DQNRunConfig, rank: int, ranks: int, port: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
        self._joined = contextlib.ExitStack()
        self._joined.enter_context(distributed.joined(config))
        super().__init__(config)  # with games of its own


class Group:
    """The processes of a run on several ranks, which play together."""

    def __init__(self, config: DQNRunConfig, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ranks = [
            Worker(f"rank {rank} of {ranks}", RankOfOurs, config, rank, ranks, port) for rank in range(ranks)
        ]
        self.shares: list[float] = []  # of every turn, the part that rank 0 waited for the others and the network

    def wait(self) -> None:
        """Until all are ready."""
        for rank in self._ranks:
            rank.wait()

    def turn(self, seconds: float) -> float:
        """Steps of all ranks per second while they play for about this long."""
        for rank in self._ranks:
            rank.begin(seconds)
        turns = [rank.result() for rank in self._ranks]
        self.shares.append(100 * turns[0].waited)
        return turns[0].speed

    def close(self) -> None:
        """End them."""
        for rank in self._ranks:
            rank.close()


def counts(device: str) -> list[int]:
    """1, 2, 4, ... ranks, as many as there are GPUs or, without one, cores; 8 at most."""
    import torch

    most = torch.cuda.device_count() if choose_device(device).type == "cuda" else len(available_cores())
    if device.startswith("cuda:"):
        most = 1
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


@contextlib.contextmanager
def groups(makers: dict[str, tuple[DQNRunConfig, int]]) -> Iterator[dict[str, Group]]:
    """A group that is ready for each name. All are ended at the end."""
    with contextlib.ExitStack() as closing:
        made = {}
        for i, (name, (config, ranks)) in enumerate(makers.items()):
            log.info(f"  starting {i + 1} of {len(makers)}: {name}")
            made[name] = Group(config, ranks)
            closing.callback(made[name].close)
            made[name].wait()
        yield made


def scale_rows(settings: BenchConfig) -> list[Row]:
    """Steps per second of 1, 2, ... ranks, each with an equal share of the cores, and what they wait for each other."""
    numbers = counts(settings.device)
    threads = max(1, len(available_cores()) // numbers[-1])
    config = contenders.our_config(settings.device, min(settings.num_envs, 32), curious=False)
    config = replace(config, threads=threads, env=replace(config.env, num_threads=threads), rank_timeout=3_600.0)
    config = replace(config, execution="eager")  # as several ranks run
    one = f"1 rank, {config.env.num_envs} games"
    makers = {one: (config, 1)}
    for n in (n for n in numbers[1:] if config.env.num_envs % n == 0):
        makers[f"{n} ranks, {config.env.num_envs * n} games, batch {n * config.agent.batch_size}"] = grown(config, n), n
        makers[f"{n} ranks, {config.env.num_envs} games in all, batch {config.agent.batch_size}"] = config, n

    def announce(i: int) -> None:
        log.info(f"  round {i + 1} of {settings.rounds}")

    def turn(group: Group) -> Callable[[], float]:
        return lambda: group.turn(settings.seconds)

    with groups(makers) as playing:
        speeds = alternate({name: turn(group) for name, group in playing.items()}, settings.rounds, announce)
        waited = {name: group.shares for name, group in playing.items() if name != one}
    rows = rows_of("scale", "steps/s of all ranks", speeds, one, higher_is_better=True)
    return rows + [
        Row("scale, waiting for other ranks", name, "% of the time", found) for name, found in waited.items()
    ]
