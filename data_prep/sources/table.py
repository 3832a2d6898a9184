"""Tables: CSV, TSV, JSON lines and Parquet, streamed. Images by path, by URL or as bytes; captions, labels, metadata.

Tables and the folder that their paths are relative to may be local or behind any URL that fsspec opens.

An image column may hold a path (relative to ``root``, by default the table's folder, and inside it), a URL, bytes, or
Hugging Face's ``{"bytes": ..., "path": ...}``, or a list of one of them. Text tables that hold bytes hold them as
base64: plain, marked ``base64:``, or as ``data:`` addresses.
A label column holds numbers of classes, or names, which are numbered in alphabetical order; what is neither is no
label (see ``data_prep/labels.py``), and Hugging Face's names of a Parquet column are used. All columns without a role,
and the key, become the sample's metadata; bytes in them are left out. A row that cannot be used is a rejected input
like any other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from data_prep import places, rows
from data_prep.fetch import Failed, Remote
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, cell_label, listed_names
from data_prep.places import UrlFile
from data_prep.record import Inline, Payload, Record, Rejected
from data_prep.sources.named import inside_folder
from data_prep.text import decoded
from pipeline.core.classes import union
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.where import Where

LONGEST_NAME = 4096
"""Of a path or an address."""
BASE64 = ("/9j/", "_9j_", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How JPEG, PNG, GIF and WebP begin in base64, by which it is known where nothing marks it."""
LEAST_BASE64 = 64
"""Characters that no path without a dot has."""
_URL_SAFE = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    image: str
    caption: tuple[str, ...] = ()
    """The first is the caption (``.txt``); another one named NAME becomes ``.NAME.txt``."""
    label: str = ""
    key: str = ""
    """Decides the split; left out: the path or URL, or else the image's bytes. Stays in the metadata."""
    expected: str = ""
    """Hash that a downloaded image must have."""


@dataclass
class TableSource:
    """Rows of one or several tables."""

    tables: Sequence[str | os.PathLike[str]]
    columns: Columns
    root: str = ""
    """Folder that paths are relative to, and must stay inside; left out: the folder of each table."""
    known: Known = NONE_KNOWN
    where: str = ""
    """Which rows are taken (see ``pipeline/core/where.py``); empty: all."""
    classes: tuple[str, ...] = field(default=(), init=False)
    total: int | None = field(default=None, init=False)
    left_out: int = field(default=0, init=False)
    """Rows that ``where`` does not take."""
    positional: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.tables = [p for table in self.tables for p in rows.tables(str(table))]
        c = self.columns
        self._where = Where(self.where) if self.where else None
        filtered = self._where.columns if self._where else ()
        wanted = {name for name in (c.image, *c.caption, c.label, c.key, c.expected, *filtered) if name}
        for path in self.tables:
            there = rows.header(path)
            for name in sorted(wanted - set(there)):
                raise ConfigError(f"{path} has no column {name!r}, only {', '.join(map(repr, there)) or 'nothing'}")
            for name in [name for name, times in Counter(there).items() if times > 1]:
                raise ConfigError(f"{path} has several columns {name!r}: rename all but one")
        stems = Counter(_stem(name) for name in c.caption[1:])
        for stem in [stem for stem, times in stems.items() if times > 1]:
            same = ", ".join(repr(name) for name in c.caption[1:] if _stem(name) == stem)
            raise ConfigError(f"the captions {same} would all be .{stem}.txt: rename all but one")
        self._names = {str(p): _class_names(str(p), c.label) for p in self.tables}
        self._classes = Classes(())
        if c.label or self._where:
            self._look_through()
        else:
            counts = [rows.count(path) for path in self.tables]
            self.total = None if None in counts else sum(n for n in counts if n is not None)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        return {
            "kind": "table",
            "tables": [str(p) for p in self.tables],
            "columns": asdict(self.columns),
            "root": self.root,
            **({"where": self.where} if self.where else {}),
        }

    def _look_through(self) -> None:
        """Count the rows that are taken and number their classes, in a pass over the columns for it alone."""
        label = self.columns.label
        columns = sorted({label, *(self._where.columns if self._where else ())} - {""})
        labels: set[Label] = set()
        why, self.total = "", 0
        for path, names in self._names.items():
            for row in rows.rows(path, columns):
                if self._where and self._where.keeps(row) is False:
                    self.left_out += 1
                    continue
                self.total += 1
                found = cell_label(row.get(label), names) if label else ""
                labels |= {found} if isinstance(found, Label) else set()
                why = why or (found if isinstance(found, str) else "")
        if self.left_out and not self.total:
            raise ConfigError(f"--where {self.where} takes none of {self.left_out:,} rows")
        if label and self.total and not labels:
            raise DataError(f"no label in column {label!r}: {why}")
        names = union(self._names.items())
        self._classes = Classes(labels, self.known, names)
        self.classes = self._classes.names

    def __iter__(self) -> Iterator[Record]:
        place = 0
        for path in self.tables:
            path = str(path)
            root = self.root or os.path.dirname(path)
            root = root if places.is_url(root) else os.path.realpath(root)
            for row in rows.rows(path):
                kept = self._where.keeps(row) if self._where else True
                if kept is not False:
                    yield self._record(place, row, root, path, kept if isinstance(kept, str) else "")
                place += 1

    def _record(self, place: int, row: rows.Row, root: str, table: str, problem: str) -> Record:
        c = self.columns
        payload, identity, stamp = self._image(row, root, table)
        found = cell_label(row.get(c.label), self._names[table]) if c.label else None
        label, wrong = self._classes.look_up(found)
        if (problem or wrong) and not isinstance(payload, Failed):
            payload = Failed(problem or f"column {c.label!r}: {wrong}")
        captions: dict[str, str] = {}
        try:
            captions = dict(_captions(row, c.caption))
        except ValueError as error:
            payload = Failed(f"a caption is {error}")
        roles = {c.image, *c.caption, c.label, c.expected}
        metadata = {k: _plain(v) for k, v in row.items() if k not in roles and not isinstance(v, bytes)}
        facts = json.dumps([label, captions, metadata], default=str, ensure_ascii=False)
        digest = hashlib.sha256(facts.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Record(
            key=f"{place:09d}",
            identity=_text(row.get(c.key)) if c.key else identity,
            image=payload,
            stamp=f"{stamp} {digest}",
            label=label,
            caption=captions.pop("txt", None),
            more={extension: text.encode("utf-8", "replace") for extension, text in captions.items()},
            metadata=metadata or None,
        )

    def _image(self, row: rows.Row, root: str, table: str) -> tuple[Payload, str, str]:
        """Payload, identity and stamp of a row's image."""
        try:
            value, named = _image_cell(row, self.columns.image)
        except Rejected as error:
            return Failed(str(error)), f"{os.path.basename(table)}: {error}", "broken"
        if isinstance(value, bytes):
            digest = hashlib.sha256(value).hexdigest()
            return Inline(value), named or digest, digest
        if not value:
            return Failed(f"nothing in column {self.columns.image!r}"), f"{os.path.basename(table)}: empty", "empty"
        return self._named(value, row, root)

    def _named(self, text: str, row: rows.Row, root: str) -> tuple[Payload, str, str]:
        """The same for an image that the row names."""
        if places.is_url(root) and (text.startswith(f"{root.rstrip('/')}/") or not places.is_url(text)):
            url = places.inside(text, root)
            payload = Failed(f"outside of {root}") if url is None else UrlFile(url)
            return payload, text, ""
        if places.is_url(text):
            expected = _text(row.get(self.columns.expected)) if self.columns.expected else ""
            return Remote(text, expected), text, expected
        return inside_folder(text, root)


def _image_cell(row: rows.Row, column: str) -> tuple[str | bytes, str]:
    """An image or its name, empty where there is none, and what it is called beside that.

    Raises:
        Rejected: it is neither.
    """
    if rows.BROKEN in row:
        raise Rejected(row[rows.BROKEN])
    value, named = row.get(column), ""
    if isinstance(value, list):
        several = cast("list[Any]", value)
        if len(several) > 1:
            raise Rejected(f"{len(several)} images in column {column!r}, and a sample has one")
        value = several[0] if several else None
    if isinstance(value, Mapping):
        cell = cast("Mapping[str, Any]", value)
        named = _text(cell.get("path"))
        value = cell.get("bytes") or named
    if isinstance(value, bytes):
        return value, named
    if value is not None and not isinstance(value, (str, int, float)):
        raise Rejected(f"no image but {type(value).__name__} in column {column!r}")
    found = _embedded(_text(value))
    if isinstance(found, str) and len(found) > LONGEST_NAME:
        raise Rejected(f"neither a path nor an address nor base64, but {len(found):,} characters: {found[:40]!r}...")
    return found, named


def _embedded(text: str) -> str | bytes:
    """An image that is written as text, or else the text.

    Raises:
        Rejected: it is marked as base64, and is not.
    """
    head, mark, _ = text[:100].partition(";base64,")
    marked = "base64:" if text.startswith("base64:") else head + mark if mark and head.startswith("data:") else ""
    if not marked and not (len(text) >= LEAST_BASE64 and text.startswith(BASE64)):
        return text
    words = "".join(text[len(marked) :].split()).translate(_URL_SAFE)
    try:
        return base64.b64decode(words + "=" * (-len(words) % 4), validate=True)
    except ValueError as error:
        if marked:
            raise Rejected(f"not base64: {error}: {text[:60]!r}") from error
        return text


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it: without bytes, and null for what is no number."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in cast("Mapping[str, Any]", value).items() if not isinstance(v, bytes)}
    if isinstance(value, list):
        return [_plain(v) for v in cast("list[Any]", value) if not isinstance(v, bytes)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    """A cell as text. A column of whole numbers with gaps comes as floats, and its gaps as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _captions(row: rows.Row, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Extension and text of each caption; a cell with a list holds several. ValueError: bytes that are no text."""
    for i, name in enumerate(columns):
        value = row.get(name)
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        texts = [decoded(v) if isinstance(v, bytes) else _text(v) for v in values]
        for j, text in enumerate(t for t in texts if t):
            prefix = [_stem(name)] * (i > 0) + [str(j)] * (j > 0)
            yield ".".join([*prefix, "txt"]), text


def _stem(column: str) -> str:
    """What a further caption's column is called in a file's name."""
    return "".join(ch if ch.isalnum() and ch.isascii() else "_" for ch in column).lower()[:40]


def _class_names(path: str, column: str) -> tuple[str, ...]:
    """The names of a label column's classes, where a Parquet file holds them."""
    if not column or rows.kind_of(path) != "parquet":
        return ()
    with rows.parquet(path) as table:
        return listed_names((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"), column)
