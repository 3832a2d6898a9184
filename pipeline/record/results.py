"""``results.json``: all that evaluations found out about a run's checkpoints, each with what it means.

Numbers and tables stand in the file; pictures are files of ``figures/`` beside it, by the names that it gives.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file
from pipeline.record.files import dumps, number

FILE = "results.json"
FIGURES = "figures"
PROBE = ".results.probe"
_VERSION = 3
_READ = (1, 2, _VERSION)
Cell = str | int | float | None


@dataclass(frozen=True)
class Origin:
    """What decides a result: those of equal origin are the same, and those of unlike ones are not compared."""

    model: str
    """What was measured, as a person calls it: "step 400", "random init"."""
    step: int | None
    """The checkpoint's step; None for a model that is not one of the run's checkpoints."""
    weights: str
    """Hash of what was measured."""
    evaluation: str
    settings: Mapping[str, Any]
    """Of the evaluation, its images and its judge; no names of streams, and no seed."""
    data: Mapping[str, str]
    """What a data set was used for ("train", "test") to the fingerprint of its manifest."""
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result, and all that is needed to know what it means."""

    model: str
    """See :class:`Origin`."""
    step: int | None
    evaluation: str
    metric: str
    """Name of the number, the table or the figure."""
    split: str
    config: str
    """Fingerprint of the settings."""
    manifests: dict[str, str]
    """``Origin.data``; in the first version, of all streams by their names."""
    time: str
    weights: str = ""
    """Empty in the first version."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None

    @property
    def what(self) -> tuple[object, ...]:
        """All that decides the result but the model: rows of a line have it in common."""
        return (self.evaluation, self.metric, self.split, self.config, tuple(sorted(self.manifests.items())), self.seed)

    @property
    def key(self) -> tuple[object, ...]:
        """A newer result replaces an older one of the same key and kind."""
        return (self.weights or self.model, *self.what)


@dataclass(frozen=True, kw_only=True)
class Row(Found):
    """One number."""

    value: float
    n: int
    stderr: float | None
    better: Literal["higher", "lower"] | None

    def replaces(self, other: Row) -> bool:
        """Whether ``other`` is an older form of this number: one of the first version, known by names alone."""
        names = [(r.model, r.evaluation, r.metric, r.split) for r in (self, other)]
        return not other.weights and bool(self.weights) and names[0] == names[1]


@dataclass(frozen=True, kw_only=True)
class KeptTable(Found):
    """One table."""

    columns: list[str]
    rows: list[list[Cell]]
    """What is not finite is a text in the file, and stays one when it is read."""


@dataclass(frozen=True, kw_only=True)
class KeptFigure(Found):
    """One picture."""

    caption: str

    @property
    def file(self) -> str:
        """Where it lies in the folder of the results; that of another identity has another name."""
        mark = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        return f"{FIGURES}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.metric).lstrip('.')[:80]}-{mark}.png"


class Results(NamedTuple):
    """All of a folder, each kind in the order in which they first came."""

    rows: list[Row]
    tables: list[KeptTable]
    figures: list[KeptFigure]

    def and_of(self, more: Results) -> Results:
        """Both."""
        return Results(self.rows + more.rows, self.tables + more.tables, self.figures + more.figures)


def read_results(folder: str | os.PathLike[str]) -> Results:
    """All results of a folder; none if nothing was evaluated yet.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Results([], [], [])
    try:
        body = json.loads(text)
        if body["version"] not in _READ:
            raise DataError(f"{path} has version {body['version']}, this program reads {_VERSION}; evaluate again")
        return Results(
            [Row(**r | {"value": number(r["value"]), "stderr": number(r["stderr"])}) for r in body["results"]],
            [KeptTable(**table) for table in body.get("tables", [])],
            [KeptFigure(**figure) for figure in body.get("figures", [])],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it and evaluate again") from error


def read_together(folders: Sequence[str]) -> list[Row]:
    """The rows of several runs, with each model called "RUN: MODEL".

    Raises:
        ConfigError: a run was not evaluated.
        DataError: a file is damaged.
    """
    together = []
    for folder, name in run_names(folders).items():
        found = read_results(folder).rows
        if not found:
            raise ConfigError(f"{folder} has no results; evaluate it first: sluice eval {folder} SUITE")
        together += [replace(row, model=f"{name}: {row.model}") for row in found]
    return together


def run_names(folders: Iterable[str]) -> dict[str, str]:
    """Each folder, once, to as much of its path's end as tells it from the others: "a/mae" and "b/mae"."""
    parts = {Path(folder).resolve().parts: folder for folder in reversed(list(folders))}
    found = {}
    for whole, folder in reversed(parts.items()):
        others = [other for other in parts if other != whole]
        size = next(n for n in range(1, len(whole) + 1) if all(other[-n:] != whole[-n:] for other in others))
        found[folder] = "/".join(whole[-size:])
    return found


def ready(folder: str | os.PathLike[str]) -> None:
    """Make sure, before anything is computed, that results can be written into a folder, which is made.

    Raises:
        ConfigError: they cannot.
        DataError: those that are there are damaged.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with _lock(Path(folder)):
            read_results(folder)
            replace_file(Path(folder) / PROBE, b"")
            (Path(folder) / PROBE).unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write results into {folder} ({error.strerror}); name a folder of your own: --out FOLDER"
        ) from error


def add_results(folder: str | os.PathLike[str], new: Results) -> None:
    """Merge ``new`` into the folder's results. Safe among processes that evaluate at once."""
    with _lock(Path(folder)):
        before = read_results(folder)
        body = {
            "version": _VERSION,
            "results": _merged([row for row in before.rows if not any(r.replaces(row) for r in new.rows)], new.rows),
            "tables": _merged(before.tables, new.tables),
            "figures": _merged(before.figures, new.figures),
        }
        replace_file(Path(folder) / FILE, dumps(body, indent=1).encode() + b"\n")


def _merged(before: Sequence[Found], new: Sequence[Found]) -> list[dict[str, Any]]:
    """Each key once, where it first came, as it last came."""
    return [asdict(found) for found in {found.key: found for found in [*before, *new]}.values()]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / f".{FILE}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
