"""CSV files that grow row by row, and never hold half of one."""

from __future__ import annotations

import csv
import errno
import io
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gravitar_dqn.run.files import read_rows, written_whole

log = logging.getLogger(__name__)


class CsvLog:
    """A CSV file that only ever holds whole rows. A disk that is full costs a warning; rows wait and are tried again.

    On resume, rows beyond `last_step` (column global_step) are dropped: they will be played again. Columns that
    the file had and that are not among `columns` stay, empty in new rows.
    """

    def __init__(self, path: Path, columns: list[str], last_step: int | None = None) -> None:
        self._pending: list[bytes] = []
        self._warned = False
        self.full = False  # whether rows wait for room on the disk
        kept = [] if last_step is None else [row for row in read_rows(path) if _step(row) <= last_step]
        self.path, self.columns = path, list(dict.fromkeys([*columns, *(name for row in kept[:1] for name in row)]))
        lines = [self._line(row.get(name, "") for name in self.columns) for row in kept]  # columns may have grown
        with written_whole(path) as temporary:
            temporary.write_bytes(b"".join([self._line(self.columns), *lines]))
        self._size = path.stat().st_size

    @staticmethod
    def _line(values: Iterable[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode()

    def add(self, values: Iterable[Any]) -> None:
        """Remember a row for the next `flush`."""
        row = [*values]
        self._pending.append(self._line(row + [""] * (len(self.columns) - len(row))))

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        try:
            with self.path.open("rb+", buffering=0) as file:
                file.seek(self._size)
                if os.write(file.fileno(), data) < len(data):  # the disk filled up half-way
                    file.truncate(self._size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not self._warned:
                log.warning("%s cannot be written (%s): rows are kept and tried again", self.path, error)
            self._warned = True
            return
        self._size += len(data)
        self._pending.clear()
        self._warned = self.full = False

    @property
    def waiting(self) -> int:
        """Rows that could not be written so far."""
        return len(self._pending)


def _step(row: dict[str, str]) -> float:
    """A row's global_step; infinite where it has none, as no run writes it."""
    return int(step) if (step := row.get("global_step", "")).isdecimal() else math.inf
