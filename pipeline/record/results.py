"""What evaluations found out about checkpoints, each with what it means: all records of a folder, read together.

A record is a file of ``results/``, see :mod:`pipeline.record.records`. Earlier programs kept all in one
``results.json``, with pictures in ``figures/``: it is still read, and never written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.provenance import CONFIG_FILE
from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file
from pipeline.record.failed import read_failures
from pipeline.record.files import number
from pipeline.record.found import EARLIER, Cell, Found, Kept, KeptFigure, KeptTable, Origin, Results, Row
from pipeline.record.records import FOLDER, read_records, slug

__all__ = [
    "CHECKPOINT", "EARLIER", "Cell", "Found", "Kept", "KeptFigure", "KeptTable", "Origin", "Results", "Row",
    "read_results", "read_together", "ready", "run_names", "run_of",
]  # fmt: skip

CHECKPOINT = "checkpoint.json"
"""In the folder of a checkpoint."""
_FIGURES = "figures"
_READ = (1, 2, 3)
"""Versions of ``results.json``."""

F = TypeVar("F", bound=Found)


def read_results(folder: str | os.PathLike[str]) -> Results:
    """All results of a folder; none if nothing was evaluated yet. Of the same number, the newest."""
    earlier, records = _earlier(Path(folder)), read_records(Path(folder))
    known = [row for row in earlier.rows if not any(r.replaces(row) for r in records.rows)]
    return Results(
        _newest([*known, *records.rows]),
        _newest([*earlier.tables, *records.tables]),
        _newest([*earlier.figures, *records.figures]),
        earlier.damaged + records.damaged,
        read_failures(folder),
    )


def _newest(found: Iterable[F]) -> list[F]:
    """Each key once, where it first came, as it last came."""
    return list({one.key: one for one in found}.values())


def _earlier(folder: Path) -> Results:
    """What ``results.json`` holds."""
    path = folder / EARLIER
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] not in _READ:
            return Results([], [], [], (f"{path} has version {body['version']}, which this program does not read",))
        return Results(
            [Row(**r | {"value": number(r["value"]), "stderr": number(r["stderr"])}) for r in body["results"]],
            [KeptTable(**table) for table in body.get("tables", [])],
            [_earlier_figure(figure) for figure in body.get("figures", [])],
        )
    except FileNotFoundError:
        return Results([], [], [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Results([], [], [], (f"{path} is damaged ({error!r}); remove it, and evaluate again",))


def _earlier_figure(entry: dict[str, Any]) -> KeptFigure:
    """Its file was named by its key, of which the protocol's version was no part."""
    figure = KeptFigure(**entry, file="")
    data = tuple(sorted(figure.manifests.items()))
    what = (figure.evaluation, figure.metric, figure.split, figure.config, data, figure.seed)
    mark = hashlib.sha256(json.dumps((figure.weights or figure.model, *what)).encode()).hexdigest()[:16]
    return replace(figure, file=f"{_FIGURES}/{slug(figure.metric)}-{mark}.png")


def read_together(folders: Sequence[str]) -> Results:
    """The results of several runs, with each model called "RUN: MODEL", and files where they lie.

    Raises:
        ConfigError: a run was not evaluated.
    """
    together = Results([], [], [])
    for folder, name in run_names(folders).items():
        found = read_results(folder)
        if not found.rows:
            raise ConfigError(f"{folder} has no results; evaluate it first: sluice eval {folder} SUITE")
        rows, tables, figures, damaged, failed = located(found, folder)
        failed = tuple(one._replace(model=f"{name}: {one.model}") for one in failed)
        together = together.and_of(Results(_of(rows, name), _of(tables, name), _of(figures, name), damaged, failed))
    return together


def located(results: Results, folder: str | os.PathLike[str]) -> Results:
    """With the whole paths of pictures."""
    return results._replace(figures=[replace(f, file=str(Path(folder) / f.file)) for f in results.figures])


def _of(found: Sequence[F], run: str) -> list[F]:
    return [replace(one, model=f"{run}: {one.model}") for one in found]


def run_of(folder: str) -> str:
    """The folder of a checkpoint's run; any other folder is itself."""
    path = Path(folder).resolve()
    in_run = (path / CHECKPOINT).is_file() and (path.parent.parent / CONFIG_FILE).is_file()
    return str(path.parent.parent) if in_run else folder


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
    """
    try:
        records = Path(folder) / FOLDER
        records.mkdir(parents=True, exist_ok=True)
        probe = records / f".probe-{os.getpid()}"
        replace_file(probe, b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write results into {folder} ({error.strerror}); name a folder of your own: --out FOLDER"
        ) from error
