"""The package's log, as a person at a terminal sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from typing import TextIO

from tqdm import tqdm

from gravitar_dqn.runtime.processes import torchrun_rank


class TerminalHandler(logging.Handler):
    """Log lines on standard error, above the progress line. Nobody there to read them is no reason to stop."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line; those that are no plain information begin with their level."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError):
            tqdm.write(f"{level}{record.getMessage()}", file=sys.stderr)


def nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    with contextlib.suppress(OSError, ValueError):  # as below
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), 0)
        return bool(waiting.poll(0))
    return False


def forget_unwritten(stream: TextIO) -> None:
    """Forget what standard output or error could not take: Python would try again when it ends, and complain."""
    with contextlib.suppress(OSError, ValueError):  # a stream that is no file, or closed
        descriptor = stream.fileno()
        there, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        stream.flush()
        os.dup2(there, descriptor)
        os.close(there)
        os.close(nowhere)


def speaks() -> bool:
    """Whether this process tells what all ranks of a run know: rank 0 does, and the first one of another machine."""
    return torchrun_rank() == 0 or os.environ.get("LOCAL_RANK") == "0"


def show_log() -> None:
    """Let this package's log appear on standard error, once."""
    package = logging.getLogger("gravitar_dqn")
    if not any(isinstance(handler, TerminalHandler) for handler in package.handlers):
        package.addHandler(TerminalHandler())
        # Of the ranks of a distributed run the first speaks for all; what only another one knows is an error.
        package.setLevel(logging.ERROR if torchrun_rank() else logging.INFO)
