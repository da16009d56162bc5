"""Following a CSV file of numbers that another process appends to."""

from __future__ import annotations

import math
from pathlib import Path

CHUNK = 128 * 1024  # bytes of CSV parsed at a time


class CsvTail:
    """Reads what was appended to a CSV file of numbers; starts anew when the file was replaced or shortened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rewind()

    def rewind(self) -> None:
        self._inode = -1
        self._offset = 0
        self._last = b""  # the bytes before the offset, to notice a file that was rewritten in place
        self._header: list[str] = []

    def read(self) -> list[dict[str, float]] | None:
        """The next rows, at most a chunk; [] when there are no more for now; None when all rows so far are void."""
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                file.seek(self._offset - len(self._last))
                data = file.read(len(self._last) + CHUNK)
        except FileNotFoundError:
            return [] if self._offset == 0 else None
        if self._offset and (inode != self._inode or not data.startswith(self._last)):
            return None
        # A last line without its end is still being written: leave it for the next time.
        data = data[len(self._last) : data.rfind(b"\n") + 1]
        if not data:
            return []
        self._inode = inode
        self._offset += len(data)
        self._last = data[-64:]
        lines = data.decode(errors="replace").splitlines()
        if not self._header:
            self._header = lines.pop(0).split(",")
        return [dict(zip(self._header, map(_number, line.split(",")), strict=False)) for line in lines]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
