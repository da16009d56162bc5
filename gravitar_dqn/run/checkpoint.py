"""Checkpoints: atomic, complete, and read without trusting them.

A file appears whole or not at all; `latest` is a link that is replaced in one step. So a kill at any moment leaves
the previous checkpoint whole. A file whose checksums do not fit its contents, as a failing disk leaves it, is not used.
"""

from __future__ import annotations

import errno
import logging
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gravitar_dqn.errors import UserError
from gravitar_dqn.run.files import written_whole

FORMAT = 3  # 2 had other names in the replay buffer; 1 the features of convolutions in another order
READABLE = (2, FORMAT)  # without a replay buffer, and but for DQN's curiosity, 2 holds the same

log = logging.getLogger(__name__)


class NotWhole(UserError):
    """A checkpoint that is damaged, or holds what no checkpoint of ours would."""

    def __init__(self, path: Path, complaint: str) -> None:
        super().__init__(f"{path} {complaint}")
        self.path = path


def folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def save(run_dir: Path, state: dict[str, Any], global_step: int, keep: int = 2) -> Path:
    """Write `state` as the newest checkpoint; OSError (a full disk, say) leaves the previous one as it was.

    The newest `keep` checkpoints stay, this one among them.
    """
    home = folder(run_dir)
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"step_{global_step:012d}.pt"
    write(path, state)
    _point_to("latest", path)
    there = sorted(home.glob("step_*.pt"))
    kept = [old for old in there if old <= path][-keep:]  # later ones were left by a kill before `latest` named them
    for old in {*there, *home.glob("step_*.tmp")} - {*kept}:  # the latter too were left by a kill
        old.unlink(missing_ok=True)
    return path


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` as a checkpoint's file; OSError, a full disk say, leaves what was there before."""
    try:
        with written_whole(path) as temporary:
            torch.save({"format": FORMAT, **state}, temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise OSError(f"checkpoint not written: {error}") from error


def keep_best(run_dir: Path, candidate: Path, global_step: int) -> None:
    """Let the file `candidate` be the best checkpoint, `best`, in the place of the one before it."""
    path = folder(run_dir) / f"best_{global_step:012d}.pt"
    candidate.replace(path)
    _point_to("best", path)
    for old in set(folder(run_dir).glob("best_*.pt")) - {path}:
        old.unlink(missing_ok=True)


def find(run_dir: Path, which: str | Path) -> Path:
    """A checkpoint's file: `best`, of those that were evaluated while the run trained, or one by its path or name.

    UserError when there is none, with the names of those that are there.
    """
    if which == "best":
        if found := sorted(folder(run_dir).glob("best_*.pt")):
            return found[-1]
        raise UserError(
            f"{run_dir} has no best checkpoint: --eval-every STEPS evaluates and keeps it while a run trains"
        )
    for path in (folder(run_dir) / which, folder(run_dir) / f"{which}.pt", Path(which)):
        if path.is_file() and path.resolve().parent == folder(run_dir).resolve():
            return path
    kept = ", ".join(path.stem for path in sorted(folder(run_dir).glob("*_*.pt"))) or "none"
    raise UserError(f"{run_dir} has no checkpoint {which}: latest, best, or one of those kept, {kept}")


def _point_to(name: str, path: Path) -> None:
    """Let `name`, a link beside it, be this checkpoint."""
    link = path.with_name(f"{name}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(name))


def mend(run_dir: Path) -> None:
    """Make `latest` again after a copy of the run's folder, which may have lost the link or made a file of it."""
    paths = sorted(folder(run_dir).glob("step_*.pt"))
    if paths and not ((link := folder(run_dir) / "latest").is_symlink() and link.exists()):
        _point_to("latest", paths[-1])


def load(run_dir: Path, device: torch.device | str = "cpu", *, damaged: list[NotWhole] | None = None) -> dict[str, Any]:
    """The state in the newest checkpoint that is whole, with a warning where a newer one is not.

    It is that of `latest`, else the newest of the others. What is wrong with those before it is added to `damaged`.
    UserError when there is none, or when it is another program's.
    """
    damaged = [] if damaged is None else damaged
    newest = (folder(run_dir) / "latest").resolve()
    paths = sorted(folder(run_dir).glob("step_*.pt"), reverse=True)
    for path in sorted(paths, key=lambda path: path.name != newest.name):
        try:
            state = read(path, device)
        except NotWhole as error:
            damaged.append(error)
            continue
        if damaged:
            log.warning("%s; %s is used instead", damaged[0], path.name)
        return state
    if damaged:
        raise damaged[0]
    raise UserError(f"{run_dir} has no checkpoint yet: start the run again in another folder")


def set_aside(run_dir: Path, damaged: Iterable[NotWhole]) -> None:
    """Rename the damaged files of a run that goes on, so that none counts among those that are kept."""
    for error in damaged:
        error.path.rename(aside := error.path.with_name(f"{error.path.name}.damaged"))
        log.info("the damaged checkpoint is kept as %s", aside)
    mend(run_dir)


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint file.

    NotWhole when it is damaged; UserError when it is another program's, or cannot be read at present.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} does not fit")
        with warnings.catch_warnings(action="ignore"):  # torch's word on files that are not its own
            state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # torch's message says how to load it all the same
        raise NotWhole(path, "holds more than tensors and plain values, which might run code: not read") from None
    except Exception as error:  # the readers fail in many ways, IndexError and struct.error among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if may_be_whole(error):
            raise UserError(f"{path} cannot be read at present: {reason}") from None
        raise NotWhole(path, f"is not a whole checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") not in READABLE:
        raise UserError(f"{path} is not a checkpoint of this program (formats {READABLE[0]} and {FORMAT})")
    if name := not_finite(state):
        raise NotWhole(path, f"holds NaN or infinity in {name}")
    agent = state.get("agent")
    if isinstance(agent, dict) and "curiosity" in agent:  # its name in format 2
        agent["rnd"] = agent.pop("curiosity")
    return state


def may_be_whole(error: Exception) -> bool:
    """Whether what kept a file from being read lies not in the file: no permission, too many files, no memory."""
    if isinstance(error, OSError):
        return error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, MemoryError) or "allocate memory" in str(error)  # torch has a RuntimeError for it


def not_finite(state: Any, name: str = "") -> str:
    """Where in a nested state ("agent.policy.trunk.0.weight") the first tensor with NaN or infinity is; else ""."""
    if isinstance(state, torch.Tensor):
        return name if state.is_floating_point() and not bool(torch.isfinite(state).all()) else ""
    if not isinstance(state, (Mapping, list, tuple)):
        return ""
    inner = state.items() if isinstance(state, Mapping) else enumerate(state)
    found = (not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in inner)
    return next(filter(None, found), "")
