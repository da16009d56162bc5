"""Signals that stop this process, and commands of this package as other processes."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Stop:
    """Set by Ctrl-C, SIGTERM or a closed terminal, so that the run can save; a second Ctrl-C interrupts at once.

    Not under torchrun, which hands on signals that its processes may have had already; it kills what has not ended
    30 seconds later.
    """

    def __init__(self) -> None:
        self._number = 0  # of the signal

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._number > 0

    @property
    def exit_code(self) -> int:
        """What a process that a signal ended returns to the shell; 0 without one."""
        return 128 + self._number if self._number else 0

    def __enter__(self) -> Stop:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if not by_torchrun():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_rank() -> int:
    """The number of this process among those that torchrun has started; 0 without it."""
    return int(os.environ["RANK"]) if by_torchrun() else 0


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def package_command(words: Sequence[str]) -> list[str]:
    """A command of this package, run by the Python that runs this."""
    return [sys.executable, "-m", "gravitar_dqn", *words]


def start(command: Sequence[str], log: Path, *, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process; the command, without the folders that lead here, and what it prints go into `log`.

    In a session of its own, a Ctrl-C on the terminal reaches the process only through this one, and so once.

    Args:
        command: the program and its arguments.
        log: the file.
        env: environment variables to set beside those that are.
    """
    with log.open("ab") as file:
        words = [_program(command[0], Path(command[0]).name), *command[1:]]
        file.write(f"$ {shlex.join(word.replace(f'{Path.cwd()}/', '') for word in words)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
        )


def die_with_parent() -> None:
    """Have this process sent SIGTERM when the one that started it ends, where the system can do that."""
    if _LIBC is not None:
        _LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def command_line(words: Sequence[str], command: str = "") -> str:
    """What to type so that the program that runs does `command`, its own where none is named, with these words."""
    program = Path(sys.argv[0])
    if program.suffix == ".py" and program.name != "__main__.py":
        start, command = [sys.executable, str(program)], ""
    else:
        start = [sys.executable, "-m", "gravitar_dqn"] if program.suffix == ".py" else [str(program)]
    return shlex.join([_program(start[0], start[0]), *start[1:], *filter(None, [command]), *words])


def _program(path: str, otherwise: str) -> str:
    """A program's path from the present folder where it lies below that; else `otherwise`."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else otherwise
