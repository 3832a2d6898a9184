"""``metrics.jsonl``: one line per log step, appended and never rewritten.

A line holds ``step``, ``attempt`` (0 for the first start of the run, 1 for the second ...) and what the engine hands
over: ``samples``, ``epoch``, ``loss``, the objective's metrics, ``lr``, ``grad_norm``, ``samples_per_second``,
``data_wait`` (part of the time that was spent waiting for data), ``step_seconds``, ``memory_gb`` and ``data_digest``
(hex). What belongs to a phase has its name before it, "critic/loss"; ``survey_seconds`` is there where the objective
surveys its data. How a value that is not finite is written: :mod:`pipeline.record.files`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.record.files import Lines, number, read_lines, tail

FILE = "metrics.jsonl"
Value = float | int | str


class MetricsLog:
    """Appends to ``FOLDER/metrics.jsonl``; see :class:`pipeline.record.files.Lines` for what a kill leaves behind."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._lines = Lines(Path(folder) / FILE)

    def append(self, row: Mapping[str, Value]) -> None:
        """Append one line; ``row`` must hold "step"."""
        assert "step" in row, f"a line without its step: {row}"
        self._lines.append(row)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class History(NamedTuple):
    """A run's metrics as they were read."""

    rows: list[dict[str, Any]]
    """By step, each step once."""
    torn: int
    """Lines that a kill left unfinished, and that were skipped."""


def read_history(folder: str | os.PathLike[str]) -> History:
    """The line of each step that counts, and the number of torn lines.

    Nothing is deleted when a run resumes at an earlier step, so a step may have several lines, and the last one
    counts. A line whose step is not above the one before it marks such a resume: what was logged from that step on
    is superseded as a whole, also where the new attempt logs at other steps (as with another global batch).
    """
    lines, torn = read_lines(Path(folder) / FILE)
    rows: list[dict[str, Any]] = []
    for line in lines:
        while rows and rows[-1]["step"] >= line["step"]:
            rows.pop()
        rows.append({k: number(v) for k, v in line.items()})
    return History(rows, torn)


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of :func:`read_history`; torn lines are counted in the log."""
    rows, torn = read_history(folder)
    if torn:
        logging.getLogger(__name__).warning("%s: skipped %d torn line(s)", Path(folder) / FILE, torn)
    return rows


def read_last(folder: Path) -> dict[str, Any]:
    """The last whole line, from the end of the file; empty before the first."""
    for line in reversed(tail(folder / FILE).split(b"\n")[:-1]):
        try:
            return {name: number(value) for name, value in json.loads(line).items()}
        except ValueError:  # torn by a kill
            continue
    return {}
