"""From what an evaluation yields to its record: numbers, tables, pictures, and what each sample adds."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import pipeline
from pipeline.config import provenance
from pipeline.core.evaluation import Number, Output, Table
from pipeline.record.found import Origin, Results
from pipeline.record.pictures import png
from pipeline.record.records import FOLDER, About, Record, pack, results_of, slug, write_record


def found(outputs: Sequence[Output], origin: Origin, about: About | None = None) -> Results:
    """What an evaluation yielded, each with its origin and the present time, as its record would have it."""
    body, files = _contents(outputs, origin)
    return results_of(Record(origin, about or About(), body | {"files": dict.fromkeys(files, "")}), Path())


def keep(
    folder: str | os.PathLike[str], outputs: Sequence[Output], origin: Origin, about: About | None = None
) -> Results:
    """Write the record of an evaluation. Outcomes and pictures are whole before the record names them.

    Args:
        folder: of the results.
        outputs: what the evaluation yielded.
        origin: what decides them.
        about: what else is told.

    Raises:
        OSError: the disk takes no more.
    """
    body, files = _contents(outputs, origin)
    return results_of(write_record(Path(folder), origin, about or About(), body, files), Path(folder))


def _contents(outputs: Sequence[Output], origin: Origin) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Of a record, and the files beside it by their names."""
    arrays: dict[str, np.ndarray] = {}
    files: dict[str, bytes] = {}
    numbers, tables, figures = [], [], []
    for o in outputs:
        name = {"metric": o.name, "split": o.split}
        if isinstance(o, Number):
            own = {"value": o.value, "n": o.n, "stderr": o.stderr, "better": o.better}
            numbers.append(name | own | {"outcomes": _outcomes(o, arrays, f"{origin.name}.npz")})
        elif isinstance(o, Table):
            tables.append(name | {"columns": list(o.columns), "rows": [list(row) for row in o.rows]})
        else:
            file = f"{origin.name}-{len(figures)}-{slug(o.name)}.png"
            files[file] = png(o.image)
            figures.append(name | {"caption": o.caption, "file": f"{FOLDER}/{file}"})
    if arrays:
        files[f"{origin.name}.npz"] = pack(arrays)
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    return {"time": now, **_made_by(), "numbers": numbers, "tables": tables, "figures": figures}, files


def _outcomes(number: Number, arrays: dict[str, np.ndarray], file: str) -> dict[str, Any] | None:
    """Put what each sample adds to a number among the arrays of a file; sources that numbers share are there once."""
    if number.samples is None:
        return None
    kept = number.samples if number.samples.dtype == bool else number.samples.astype(np.float32)
    assert kept.shape == (number.n,), f"{number.name} has {number.n} samples and tells of {kept.shape}"
    values, sources = f"values{len(arrays)}", None
    arrays[values] = kept
    if number.sources is not None:
        own = number.sources.astype(np.int64)
        assert own.shape == (number.n,), f"{number.name} has {number.n} samples and sources of {own.shape}"
        same = (name for name, array in arrays.items() if name.startswith("sources") and np.array_equal(array, own))
        sources = next(same, f"sources{len(arrays)}")
        arrays[sources] = own
    return {"file": file, "values": values, "sources": sources}


@cache
def _made_by() -> dict[str, Any]:
    """Who makes numbers in this process."""
    commit, diff = provenance.code_state(Path(pipeline.__file__).parent)
    return {
        "python": platform.python_version(),
        "versions": provenance.versions(),
        "commit": commit,
        "dirty": bool(diff),
    }
