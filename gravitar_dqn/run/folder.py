"""A run's folder: who holds it, and what its run is (`config.json`: settings, versions, commit, device)."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gravitar_dqn.config import FREE_FIELDS, RunConfig, flatten, to_dict
from gravitar_dqn.errors import UserError
from gravitar_dqn.presets import from_dict
from gravitar_dqn.run.files import last_row, read_json, write_json

# What a run writes before its first checkpoint.
BEGUN = {"lock", "config.json", "metrics.csv", "episodes.csv", "evaluations.csv", "checkpoints"}


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder, which is made where there is none; UserError while another process does.

    It ends with its process. Where nothing came to be in the folder, that is left as it was found.
    """
    from filelock import FileLock, Timeout  # --help goes without it

    held = FileLock(run_dir / "lock", timeout=0.2)  # `is_held` has it for a moment
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(f"{run_dir} is in use: another process trains in it; stop that first") from None
    except OSError as error:
        raise cannot_be_written(run_dir, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in run_dir.iterdir()] == ["lock"]:
                (run_dir / "lock").unlink()
                for folder in made:
                    folder.rmdir()
        held.release()


def is_held(run_dir: Path) -> bool:
    """Whether a process holds the run's folder, as far as this machine knows."""
    with contextlib.suppress(OSError), (run_dir / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def claimed(path: Path, asked: Mapping[str, Any], what: str) -> Iterator[None]:
    """Hold the folder of `what`, a sweep say, which is begun with the settings `asked`; they are kept in file `path`.

    UserError when the folder holds something else, or was begun with other settings.
    """
    if holds_other(path.parent, path.name):
        raise UserError(f"{path.parent} exists and is not {what}'s folder: another --dir starts anew")
    with lock(path.parent):
        before = read_json(path) if path.exists() else asked
        changes = [f"{name}: {before.get(name)} -> {new}" for name, new in asked.items() if before.get(name) != new]
        if changes:
            raise UserError(
                f"{path.parent} holds {what} with other settings, another --dir starts anew: {'; '.join(changes)}"
            )
        write_json(path, before)
        yield


def holds_other(folder: Path, ours: str) -> bool:
    """Whether a folder has something in it, a lock and what a kill left of a file beside, but not the file `ours`."""
    if folder.is_file():
        return True
    there = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} if folder.exists() else set()
    return bool(there - {"lock"}) and ours not in there


def check_free(run_dir: Path) -> None:
    """Raise UserError for the folder of a new run that holds another one."""
    if holds_other(run_dir, ours=""):
        is_run = (run_dir / "config.json").exists()
        how = f"--resume {run_dir} resumes it, as does this command with --resume auto; " if is_run else ""
        raise UserError(f"{run_dir} exists: {how}another --run-dir starts anew")


@contextlib.contextmanager
def removed_after_errors(run_dir: Path) -> Iterator[None]:
    """After an error inside, what appeared in the folder is removed."""
    before = {*run_dir.iterdir()}
    try:
        yield
    except BaseException:
        for path in {*run_dir.iterdir()} - before:
            with contextlib.suppress(OSError):  # the error that led here says more
                _remove(path)
        raise


def _remove(path: Path) -> None:
    """Remove a file, or a folder and all in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_to_resume(run_dir: Path) -> RunConfig | None:
    """The settings of the run in a folder; None where a new one can begin.

    What a kill before the first checkpoint left is removed. UserError when the run cannot be resumed, or the folder
    holds something else.
    """
    from gravitar_dqn.run import checkpoint  # torch

    if not holds_other(run_dir, ours=""):
        return None
    load_run(run_dir)  # a folder of something else gets no lock
    with lock(run_dir):
        checkpoint.mend(run_dir)  # the folder may have been copied
        if (checkpoint.folder(run_dir) / "latest").exists():
            return load_run(run_dir, to_train=True)
        left = {path.name for path in run_dir.rglob("*") if path.suffix != ".tmp"}
        rows = [last_row(run_dir / f"{name}.csv") for name in ("metrics", "episodes", "evaluations")]
        if any(rows) or not left <= BEGUN:
            raise UserError(f"{run_dir} has lost its checkpoints: copy them back, or another folder starts anew")
        # config.json is removed last: after a kill in between the folder is still known to be a run's.
        for path in sorted({*run_dir.iterdir()} - {run_dir / "lock"}, key=lambda path: path.name == "config.json"):
            _remove(path)
    return None


def cannot_be_written(run_dir: Path, error: OSError) -> UserError:
    """The error of a folder that takes no files."""
    return UserError(f"the run's folder {run_dir} cannot be written: {error.strerror or error}")


def write_config(run_dir: Path, config: RunConfig, **facts: Any) -> None:
    """config.json: all settings, what they ran on, and further facts of this run."""
    record = {"preset": config.preset, "config": to_dict(config), "versions": versions(), "commit": commit(), **facts}
    write_json(run_dir / "config.json", record)


def load_run(run_dir: Path, *, to_train: bool = False) -> RunConfig:
    """The configuration in a run's folder (`config.json`); UserError when it is no such folder.

    Settings that are newer than the run are as in today's preset, but not `to_train` on: that would be another run.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} is not a run's folder: it has no config.json")
    record = read_json(path)
    if "config" not in record:
        raise UserError(f"{path} is not a run's configuration")
    config = from_dict(record["config"])
    if to_train and (newer := sorted(set(flatten(to_dict(config))) - {*flatten(record["config"]), *FREE_FIELDS})):
        raise UserError(f"{run_dir} was started by a version without {newer[0]}: it can be played, but not go on")
    return config


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in "gravitar-dqn torch numpy gymnasium ale-py visdom stable-baselines3".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """This source tree's commit, "-dirty" where it was changed; nothing where it is installed without one."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return ""
