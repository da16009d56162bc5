"""Files that appear whole or not at all, and what runs leave behind in CSV and JSON."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gravitar_dqn.errors import UserError


@contextlib.contextmanager
def written_whole(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes `path`'s place at the end, and is removed after an error.

    It is flushed to the disk first: a kill or a crash at any moment leaves the file as it was, or whole. `suffix` is
    its name's in place of `path`'s.
    """
    temporary = path.with_suffix(suffix)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table as JSON."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(table, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; UserError when there is none in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no table")
    return found


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV file's whole rows; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return _whole_rows(file)


def _whole_rows(lines: Iterable[str]) -> list[dict[str, str]]:
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def last_row(path: Path, tail: int = 2**16) -> dict[str, str]:
    """A CSV file's last whole row, looked for in its last `tail` bytes; {} when there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        header = file.readline()
        file.seek(max(len(header), path.stat().st_size - tail))
        lines = [header, *file.read().splitlines(keepends=True)]
    return next(reversed(_whole_rows(line.decode(errors="replace") for line in lines)), {})


def wall_seconds(run_dir: Path) -> float:
    """Training time so far, by metrics.csv; 0 before there is any."""
    return float(last_row(run_dir / "metrics.csv").get("wall_seconds", 0.0))


def last_line(path: Path) -> str:
    """The last line that the last command ("$ ...") in a log printed; nothing where there is no log."""
    text = path.read_text(errors="replace") if path.exists() else ""
    printed = ("\n" + text).rpartition("\n$ ")[2].partition("\n")[2].strip()
    return printed.rpartition("\n")[2].strip()
