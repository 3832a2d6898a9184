"""Files that survive a kill: strict JSON, and lines that are appended whole.

JSON has no number for "not finite". As in protobuf's JSON mapping, such a value is written as one of the texts "NaN",
"Infinity" and "-Infinity"; so every reader can parse the file, and which of the three it was is not lost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FROM_TEXT = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _as_text(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _as_text(value)
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """``value`` as strict JSON: no ``NaN`` or ``Infinity`` literals, which most readers refuse."""
    return json.dumps(_strict(value), allow_nan=False, indent=indent)


def number(value: Any) -> Any:
    """Undo what :func:`dumps` did to a value that is not finite; any other value is returned as it is."""
    return _FROM_TEXT.get(value, value) if isinstance(value, str) else value


class Lines:
    """A file to which JSON lines are appended, each by one write of the operating system, with no buffer between.

    A process killed in the middle of a write leaves a torn last line. Opening the file ends such a line, so that the
    next one starts afresh; readers skip the torn one.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Append ``row`` as one line.

        Raises:
            OSError: the disk is full or the file system refuses; what was written of the line is skipped by readers.
        """
        self._write(dumps(row).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        while data:  # a second turn only when the disk took a part; it then names the reason, or writes the rest
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of :class:`Lines` in the order they were written, and the number of torn lines skipped.

    A file that is not there has no rows: a run that has not logged yet.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    rows, torn = [], 0
    for line in filter(None, data.split(b"\n")):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or a character cut in half
            torn += 1
        else:
            rows.append(row)
    return rows, torn


TAIL_BYTES = 1 << 16


def tail(path: Path) -> bytes:
    """The end of a file, :data:`TAIL_BYTES` at most; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""
