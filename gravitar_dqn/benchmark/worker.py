"""Contenders in turn, each in a process of its own: threads, allocator and caches of one do not touch another."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from gravitar_dqn.benchmark.options import BenchConfig
from gravitar_dqn.errors import UserError
from gravitar_dqn.runtime import distributed

log = logging.getLogger(__name__)


class Contender(Protocol):
    """Something that plays and learns."""

    def play(self) -> int:
        """A short stretch of training; returns the agent steps played."""


Maker = Callable[[], Contender]  # called in the contender's process
Turn = tuple[float, float]  # steps per second, and the share of the time that it waited for other ranks


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, make: Maker) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, seconds: float) -> None:
        """Let it play for about this long."""
        self._connection.send(seconds)

    def answer(self) -> Any:
        """None when it has been made, a Turn when it has played; UserError with its complaint when it cannot."""
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError(f"{self._name} ended unexpectedly") from None
        if isinstance(answer, str):
            raise UserError(f"{self._name}: {answer}")
        return answer

    def end(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.join()


def _serve(connection: Any, make: Maker) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its log is for somebody who trains
                contender = make()
                contender.play()  # warm up
            connection.send(None)
            while True:
                connection.send(_play_for(contender, connection.recv()))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def _play_for(contender: Contender, seconds: float) -> Turn:
    steps, start, waited = 0, time.perf_counter(), distributed.waited()
    while True:
        steps += contender.play()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = time.perf_counter() - start
        if distributed.counts(int(passed >= seconds))[0]:  # ranks end after the same step
            return steps / passed, (distributed.waited() - waited) / passed


def take_turns(makers: Mapping[str, Sequence[Maker]], settings: BenchConfig) -> dict[str, list[Turn]]:
    """The turns of every contender, round by round.

    Args:
        makers: of every contender one, or one for each rank of its run; then the turns are those that rank 0 reports.
        settings: how many rounds there are, and how long a turn is.
    """
    groups: dict[str, list[Worker]] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in makers}
    with contextlib.ExitStack() as ending:
        for i, (name, ranks) in enumerate(makers.items(), start=1):
            log.info(f"  starting {i} of {len(makers)}: {name}")
            groups[name] = [Worker(name, make) for make in ranks]
            for worker in groups[name]:
                ending.callback(worker.end)
            for worker in groups[name]:
                worker.answer()  # contenders that start all at once would only get in each other's way
        for i in range(1, settings.rounds + 1):  # the line comes between turns: nobody plays meanwhile
            log.info(f"  round {i} of {settings.rounds}: {len(makers)} turns of {settings.seconds:g} s or more")
            for name, group in groups.items():
                for worker in group:
                    worker.begin(settings.seconds)
                of_rank_0, *_ = [worker.answer() for worker in group]
                turns[name].append(of_rank_0)
    return turns
