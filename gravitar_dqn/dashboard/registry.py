"""Which environment of a server is which run: their names, and links to the runs' folders for our own server."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from gravitar_dqn.dashboard.visdom_files import cache_dir


def environment_name(run_dir: Path) -> str:
    """The run's environment on the server: its folder's name and six letters of its whole path's hash.

    Visdom folds names at "_" and reads "/", "+" and more as its own; what is left may be the same for two folders, or
    the name of somebody else's environment, hence the hash.
    """
    path = run_dir.resolve()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", path.name).strip("-.")[:80]
    return f"{name or 'run'}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def register(run_dir: Path) -> None:
    """Note where an environment's run is, so that a server on this machine can tell how it stands."""
    link, target = cache_dir() / "runs" / environment_name(run_dir), run_dir.resolve()
    with suppress(OSError):  # a full or read-only disk: the page says less, drawing goes on
        if link.is_symlink() and link.readlink() == target:
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        for other in link.parent.iterdir():
            if other.is_symlink() and not other.exists():  # a run that was deleted
                other.unlink(missing_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        temporary.replace(link)


def registered() -> dict[str, Path]:
    """The runs' folders that are known and still there, by environment."""
    with suppress(OSError):
        links = [link for link in (cache_dir() / "runs").iterdir() if link.is_symlink() and link.name[0] != "."]
        return {link.name: link.readlink() for link in links if (link / "config.json").is_file()}
    return {}
