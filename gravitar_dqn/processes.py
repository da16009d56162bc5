"""What a sweep and a campaign share: commands as processes with logs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def package_command(words: Sequence[str]) -> list[str]:
    """A command of this package, run by the Python that runs this."""
    return [sys.executable, "-m", "gravitar_dqn", *words]


def start(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    dies_with_us: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process; the command and what it prints are added to `log`.

    In a session of its own, a Ctrl-C on the terminal reaches the process only through this one, and so once.

    Args:
        command: the program and its arguments.
        log: the file.
        env: environment variables to set beside those that are.
        cwd: where it runs; by default where this process does.
        dies_with_us: also when this process is killed, the other is ended, by SIGTERM, where the system can do that.
            Not from a program with threads that start processes too.
    """
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            preexec_fn=_end_with_parent if dies_with_us else None,
        )


def _end_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def age() -> float:
    """Seconds since this process was started, where the system tells; else 0."""
    if sys.platform != "linux":
        return 0.0
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def hang_up_stops() -> Iterator[None]:
    """A terminal that is closed stops this process as Ctrl-C does; those it started have sessions of their own."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def command_again() -> str:
    """What was typed."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "gravitar_dqn", *sys.argv[1:]])
    return shlex.join([sys.executable, *sys.argv] if program.suffix == ".py" else sys.argv)


def how_to_train(run_dir: Path, arguments: Sequence[str], free: Sequence[str] = ()) -> list[str]:
    """Words of `train` that begin a run, or go on with it.

    Args:
        run_dir: the run's folder.
        arguments: preset and settings of a new run.
        free: settings that are also given to a run that goes on.
    """
    if (run_dir / "checkpoints" / "latest").exists():
        return ["--resume", str(run_dir), *free]
    if run_dir.exists():  # killed before its first checkpoint: train would refuse the folder
        shutil.rmtree(run_dir)
    return [*arguments, *free, "--run-dir", str(run_dir)]
