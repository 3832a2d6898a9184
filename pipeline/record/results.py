"""``results.json``: the numbers of all evaluations of a run's checkpoints, and the table that compares them."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file
from pipeline.record.files import dumps, number
from pipeline.record.formats import decimals, with_error

if TYPE_CHECKING:
    from pipeline.core.evaluation import Number

FILE = "results.json"
_VERSION = 1
_PLAIN_WIDTH = 240
"""Columns a table may take where no terminal sets them: in a log, a wrapped cell is harder to read than a long line."""


@dataclass(frozen=True)
class Row:
    """One number, and all that is needed to know what it means."""

    model: str
    """What was measured, as a person calls it: "step 400", "random init"."""
    step: int | None
    """The checkpoint's step; None for a model that is not one of the run's checkpoints."""
    evaluation: str
    metric: str
    value: float
    n: int
    split: str
    stderr: float | None
    better: Literal["higher", "lower"] | None
    config: str
    """Fingerprint of the settings that it was measured with."""
    manifests: dict[str, str]
    """Stream name to the fingerprint of its manifest."""
    time: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """A newer row replaces an older one of the same key."""
        return (self.model, self.evaluation, self.metric, self.split)


def rows(
    results: Iterable[Number],
    *,
    model: str,
    step: int | None,
    evaluation: str,
    config: str,
    manifests: Mapping[str, str],
) -> list[Row]:
    """What an evaluation yielded, with its origin (see :class:`Row`) and the present time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Row(model, step, evaluation, r.name, r.value, r.n, r.split, r.stderr, r.better, config, dict(manifests), now)
        for r in results
    ]


def read_results(folder: str | os.PathLike[str]) -> list[Row]:
    """The rows in the order in which they first came; none if nothing was evaluated yet.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        body = json.loads(text)
        if body["version"] != _VERSION:
            raise DataError(f"{path} has version {body['version']}, this program reads {_VERSION}; evaluate again")
        return [Row(**r | {"value": number(r["value"]), "stderr": number(r["stderr"])}) for r in body["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it and evaluate again") from error


def read_together(folders: Sequence[str]) -> list[Row]:
    """The rows of several runs, with each model called "RUN: MODEL".

    Raises:
        ConfigError: a run was not evaluated.
        DataError: a file is damaged.
    """
    together = []
    for folder in folders:
        found = read_results(folder)
        if not found:
            raise ConfigError(f"{folder} has no results; evaluate it first: sluice eval {folder} SUITE")
        together += [replace(row, model=f"{Path(folder).name}: {row.model}") for row in found]
    return together


def add_results(folder: str | os.PathLike[str], new: Iterable[Row]) -> list[Row]:
    """Merge ``new`` into the folder's results and return all of them. Safe among processes that evaluate at once."""
    with _lock(Path(folder)):
        merged = {row.key: row for row in read_results(folder)}
        merged.update((row.key, row) for row in new)
        body = {"version": _VERSION, "results": [asdict(row) for row in merged.values()]}
        replace_file(Path(folder) / FILE, dumps(body, indent=1).encode() + b"\n")
    return list(merged.values())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / f".{FILE}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Line:
    """One line of the table: a metric of all models."""

    evaluation: str
    metric: str
    split: str
    cells: tuple[Row | None, ...]
    """By model, in the order of :func:`models`."""

    @property
    def measured(self) -> list[Row]:
        """The cells that hold a number."""
        return [c for c in self.cells if c is not None]

    @property
    def best(self) -> float | None:
        """The best value; None where there is nothing to compare or neither direction is good."""
        finite = [c.value for c in self.measured if math.isfinite(c.value)]
        better = self.measured[-1].better
        if better is None or len(finite) < 2:
            return None
        return max(finite) if better == "higher" else min(finite)

    @property
    def comparable(self) -> bool:
        """Whether all were measured with the same settings on the same data."""
        return len({(c.config, c.n, *sorted(c.manifests.items())) for c in self.measured}) == 1

    def texts(self) -> list[str]:
        """What to print for each cell; empty where nothing was measured."""
        places = decimals([c.value for c in self.measured], [c.stderr for c in self.measured if c.stderr is not None])
        return ["" if c is None else with_error(c.value, c.stderr, places) for c in self.cells]


def models(results: Sequence[Row]) -> list[str]:
    """Columns of the table: models that are not checkpoints first, then checkpoints by step."""
    first = {row.model: (row.step is not None, row.step or 0) for row in results}
    return sorted(first, key=lambda model: first[model])


def lines(results: Sequence[Row]) -> list[Line]:
    """Lines of the table, in the order in which the metrics first came."""
    columns = models(results)
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results:
        found.setdefault((row.evaluation, row.metric, row.split), {})[row.model] = row
    return [Line(*key, tuple(cells.get(m) for m in columns)) for key, cells in found.items()]


def table(results: Sequence[Row], stream: TextIO) -> None:
    """Print the comparison: metrics as rows, models as columns, the best of each row in bold on a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("metric")
    shown.add_column("split")
    for model in models(results):
        shown.add_column(Text(model), justify="right")
    found = lines(results)
    for line in found:
        cells = [
            Text(text, style="bold" if row is not None and row.value == line.best else "")
            for row, text in zip(line.cells, line.texts(), strict=True)
        ]
        mark = "" if line.comparable else " *"
        shown.add_row(Text(line.metric + mark), Text(line.split), *cells)
    if not all(line.comparable for line in found):
        shown.caption = "* measured with different settings or on different data"
    Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH).print(shown)
