"""``results.json``: the numbers of all evaluations of a run's checkpoints, each with what it means."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file
from pipeline.record.files import dumps, number

if TYPE_CHECKING:
    from pipeline.core.evaluation import Number

FILE = "results.json"
PROBE = ".results.probe"
_VERSION = 2
_READ = (1, _VERSION)


@dataclass(frozen=True)
class Origin:
    """What decides a number: numbers of equal origin are the same number, and those of unlike ones are not compared."""

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


@dataclass(frozen=True)
class Row:
    """One number, and all that is needed to know what it means."""

    model: str
    """See :class:`Origin`."""
    step: int | None
    evaluation: str
    metric: str
    value: float
    n: int
    split: str
    stderr: float | None
    better: Literal["higher", "lower"] | None
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
        """All that decides the number but the model: rows of a line have it in common."""
        return (self.evaluation, self.metric, self.split, self.config, tuple(sorted(self.manifests.items())), self.seed)

    @property
    def key(self) -> tuple[object, ...]:
        """A newer row replaces an older one of the same key."""
        return (self.weights or self.model, *self.what)

    def replaces(self, other: Row) -> bool:
        """Whether ``other`` is an older form of this number: one of the first version, known by names alone."""
        names = [(r.model, r.evaluation, r.metric, r.split) for r in (self, other)]
        return not other.weights and bool(self.weights) and names[0] == names[1]


def rows(results: Iterable[Number], origin: Origin) -> list[Row]:
    """What an evaluation yielded, with its origin and the present time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    o, settings = origin, dict(origin.settings)
    config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    more: dict[str, Any] = {"weights": o.weights, "settings": settings, "seed": o.seed}
    return [
        Row(
            *(o.model, o.step, o.evaluation, r.name, r.value, r.n, r.split, r.stderr, r.better),
            *(config, dict(o.data), now),
            **more,
        )
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
        if body["version"] not in _READ:
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
    for folder, name in run_names(folders).items():
        found = read_results(folder)
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


def add_results(folder: str | os.PathLike[str], new: Iterable[Row]) -> list[Row]:
    """Merge ``new`` into the folder's results and return all of them. Safe among processes that evaluate at once."""
    new = list(new)
    with _lock(Path(folder)):
        before = [row for row in read_results(folder) if not any(r.replaces(row) for r in new)]
        merged = {row.key: row for row in [*before, *new]}
        body = {"version": _VERSION, "results": [asdict(row) for row in merged.values()]}
        replace_file(Path(folder) / FILE, dumps(body, indent=1).encode() + b"\n")
    return list(merged.values())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / f".{FILE}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
