"""Contenders in turn, each in a process of its own: threads, allocator and caches of one do not touch another."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gravitar_dqn.errors import UserError
from gravitar_dqn.runtime import distributed

log = logging.getLogger(__name__)


class Contender(Protocol):
    """Something that plays and learns."""

    def play(self) -> int:
        """A short stretch of training; returns the agent steps played."""


@dataclass(frozen=True)
class Turn:
    """How a contender did."""

    speed: float  # steps per second
    waited: float  # share of the time that it waited for other ranks


class Worker:
    """A contender in its own process."""

    def __init__(self, name: str, make: Callable[..., Contender], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready; UserError with its complaint when it could not be made."""
        self._receive()

    def turn(self, seconds: float) -> float:
        """Steps per second while it plays for about this long."""
        self.begin(seconds)
        return self.result().speed

    def begin(self, seconds: float) -> None:
        """Let it play; `result` waits for it."""
        self._connection.send(seconds)

    def result(self) -> Turn:
        """Of the turn that was begun."""
        turn = self._receive()
        assert isinstance(turn, Turn)
        return turn

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError(f"{self.name} ended unexpectedly") from None
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        """End its process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Any, make: Callable[..., Contender], arguments: tuple[Any, ...]) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its log is for somebody who trains
                contender = make(*arguments)
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
            return Turn(steps / passed, (distributed.waited() - waited) / passed)


@contextlib.contextmanager
def workers(makers: dict[str, tuple[Any, ...]]) -> Iterator[list[Worker]]:
    """A ready worker for each name. All are ended at the end."""
    with contextlib.ExitStack() as closing:
        made = []
        for i, (name, (make, *arguments)) in enumerate(makers.items()):
            log.info(f"  starting {i + 1} of {len(makers)}: {name}")
            made.append(Worker(name, make, *arguments))
            closing.callback(made[-1].close)
            made[-1].wait()  # all at once they would only get in each other's way
        yield made
