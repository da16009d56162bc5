"""The package's log, as a person at a terminal sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

from tqdm import tqdm


class TerminalHandler(logging.Handler):
    """Log lines on standard error, above the progress line. Nobody there to read them is no reason to stop."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line; those that are no plain information begin with their level."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError):
            tqdm.write(f"{level}{record.getMessage()}", file=sys.stderr)


def silence_stdout() -> None:
    """Lose what is printed from now on, and what waits: nobody reads it, and Python would complain when it ends."""
    with contextlib.suppress(OSError, ValueError):  # a standard output that is no file, or closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def show_log() -> None:
    """Let this package's log appear on standard error, once."""
    package = logging.getLogger("gravitar_dqn")
    if not any(isinstance(handler, TerminalHandler) for handler in package.handlers):
        package.addHandler(TerminalHandler())
        package.setLevel(logging.INFO)
