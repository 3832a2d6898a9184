"""A record: all that one evaluation found out about one model on one data set, written at once when it has ended.

``results/EVAL-MARK.json``, with MARK a hash of what decides its numbers; beside it ``EVAL-MARK.npz`` with what each
sample adds, and pictures. Nothing is shared between records, so any number of processes may write at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.core.errors import DataError
from pipeline.core.files import replace_file
from pipeline.record.files import dumps, number
from pipeline.record.found import Kept, KeptFigure, KeptTable, Origin, Outcomes, Results, Row

if TYPE_CHECKING:
    import numpy as np

FOLDER = "results"
VERSION = 4
"""The versions before had one file for all."""


@dataclass(frozen=True)
class About:
    """What is told of a record beside its origin; it decides nothing, but for ``code``, which decides re-use."""

    subject: str = ""
    """What was named to be evaluated."""
    suite: str = ""
    """Its name."""
    suite_version: int = 1
    data_name: str = ""
    """See :class:`pipeline.record.found.Found`."""
    data_names: Mapping[str, str] = field(default_factory=dict[str, str])
    group: str = ""
    code: str = ""
    """Hash of the evaluation's code, and of what else decides its numbers but not with what they are compared."""
    seconds: float | None = None
    """That it took."""


class Record(NamedTuple):
    """A record's file, read."""

    origin: Origin
    about: About
    body: dict[str, Any]
    """All of it; see :func:`write_record`."""


def write_record(
    folder: Path, origin: Origin, about: About, found: Mapping[str, Any], files: Mapping[str, bytes]
) -> Record:
    """Write a record, replacing one of the same name; what it names is there before it is.

    Args:
        folder: of the results.
        origin: what decides the numbers.
        about: what else is told.
        found: "numbers", "tables" and "figures", and who made them.
        files: those beside it, by their names in ``results/``.

    Raises:
        OSError: the disk takes no more.
    """
    room = folder / FOLDER
    room.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        replace_file(room / name, data)
    body = {"version": VERSION, "origin": asdict(origin), "about": asdict(about), **found}
    body["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    path = room / f"{origin.name}.json"
    strict = json.loads(dumps(body))
    replace_file(path, (json.dumps(strict | {"digest": _digest(strict)}, indent=1) + "\n").encode())
    for stale in set(room.glob(f"{origin.name}*")) - {path, *(room / name for name in files)}:
        stale.unlink(missing_ok=True)
    return Record(origin, about, body)


def read_record(path: Path) -> Record:
    """A record, without the files beside it.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, or of a later program.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] != VERSION:
            raise DataError(f"{path} has version {body['version']}, this program reads {VERSION}; evaluate again")
        if body.pop("digest") != _digest(body):
            raise ValueError("its hash differs")
        return Record(Origin(**body["origin"]), About(**body["about"]), body)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); what it held is evaluated anew when it is asked for") from error


def whole(folder: Path, name: str) -> Record | None:
    """The record of a name, if there is one and nothing beside it is missing or changed.

    Raises:
        DataError: it is damaged.
    """
    path = folder / FOLDER / f"{name}.json"
    try:
        record = read_record(path)
    except FileNotFoundError:
        return None
    for file, sha256 in record.body["files"].items():
        _checked(path.with_name(file), sha256)
    return record


def files_of(folder: Path, suffix: str) -> list[Path]:
    """Of the results of a folder those with a suffix, in order; none if nothing was evaluated yet."""
    room = folder / FOLDER
    try:
        return [room / name for name in sorted(os.listdir(room)) if name.endswith(suffix)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_records(folder: Path) -> Results:
    """The results of all records of a folder, in the order in which they were made."""
    records: list[tuple[str, str, Record]] = []
    damaged: list[str] = []
    for path in files_of(folder, ".json"):
        try:
            record = read_record(path)
            records.append((record.body["time"], path.name, record))
        except DataError as error:
            damaged.append(str(error))
        except FileNotFoundError:  # replaced meanwhile, or a link to nowhere
            continue
    results = Results([], [], [], tuple(damaged))
    for _, _, record in sorted(records, key=lambda found: found[:2]):
        results = results.and_of(results_of(record, folder))
    return results


def results_of(record: Record, folder: Path) -> Results:
    """What a record of a folder holds."""
    origin, about, body = record
    known: dict[str, Any] = {
        **{
            key: getattr(origin, key) for key in ("model", "step", "weights", "evaluation", "seed", "version", "config")
        },
        **{key: getattr(about, key) for key in ("subject", "data_name", "group")},
        "settings": dict(origin.settings),
        "manifests": dict(origin.data),
        "data_names": dict(about.data_names),
        "time": body["time"],
        "record": f"{FOLDER}/{origin.name}.json",
    }
    rows = [Row(**known, **_number(entry, body["files"], folder)) for entry in body["numbers"]]
    tables = [KeptTable(**known, **entry) for entry in body["tables"]]
    return Results(rows, tables, [KeptFigure(**known, **entry) for entry in body["figures"]])


def _number(entry: Mapping[str, Any], files: Mapping[str, str], folder: Path) -> dict[str, Any]:
    kept = entry["outcomes"]
    if kept is not None:
        file, values, sources = kept["file"], kept["values"], kept["sources"]
        kept = Kept(folder / FOLDER / file, files[file], values, sources)
    finite = {"value": number(entry["value"]), "stderr": number(entry["stderr"])}
    return {**entry, **finite, "outcomes": kept}


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An npz file, the same bytes for the same arrays; of bools eight in a byte."""
    import numpy as np  # not above: `sluice runs` reads records, and need not wait for it

    file = io.BytesIO()
    packed = {name: np.packbits(array) if array.dtype == bool else array for name, array in arrays.items()}
    np.savez_compressed(file, allow_pickle=False, **cast("dict[str, Any]", packed))
    return file.getvalue()


def outcomes(kept: Kept, n: int) -> Outcomes:
    """What each of ``n`` samples adds to a number.

    Raises:
        DataError: the file is missing, damaged or of another record.
    """
    import numpy as np  # see above

    try:
        with np.load(io.BytesIO(_checked(kept.file, kept.sha256)), allow_pickle=False) as arrays:
            values = arrays[kept.values]
            sources = None if kept.sources is None else arrays[kept.sources]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{kept.file} is damaged ({error}); evaluate again") from error
    if values.dtype == np.uint8:
        values = np.unpackbits(values, count=n).astype(bool)
    return Outcomes(values, sources)


def _checked(path: Path, sha256: str) -> bytes:
    """The content of a file beside a record.

    Raises:
        DataError: it is not what the record names.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}), and a record names it; evaluate again") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path} is not what its record names (its hash differs); evaluate again")
    return data


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def slug(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".")[:80]
