"""Tables: CSV, TSV, JSON lines and Parquet, streamed. Images by path, by URL or as bytes; captions, labels, metadata.

Tables and the folder that their paths are relative to may be local or behind any URL that fsspec opens.

An image column may hold a path (relative to ``root``, by default the table's folder, and inside it), a URL, bytes, or
Hugging Face's ``{"bytes": ..., "path": ...}``. Text tables that hold bytes hold them as base64, marked ``base64:``.
A label column holds numbers of classes, or names, which are numbered in alphabetical order; what is neither is no
label (see ``data_prep/labels.py``), and Hugging Face's names of a Parquet column are used. All columns without a role,
and the key, become the sample's metadata; bytes in them are left out. A row that cannot be used is a rejected input
like any other.
"""

from __future__ import annotations

import base64
import binascii
import csv
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TextIO, cast

from data_prep import places
from data_prep.fetch import Failed, Remote
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, cell_label, listed_names
from data_prep.places import UrlFile
from data_prep.record import Inline, Payload, Record
from data_prep.sources.named import inside_folder
from data_prep.sources.where import Where
from pipeline.core.classes import union
from pipeline.core.errors import ConfigError, DataError

KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PARQUET_ROWS = 32
"""Rows that are turned into Python objects together."""
BUFFER = 1024**2
"""Bytes of each Parquet column that are read at once; without such a limit whole row groups are held in memory."""
CELL = 64 * 1024**2
"""Longest cell of a CSV file."""
HEADER_ROWS = 1000
"""Rows of JSON lines in which a column must occur."""
_BROKEN = "\0broken"
"""Column that stands for a row that could not be read; its value is why."""

Row = Mapping[str, Any]


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
    """Which rows are taken (see ``data_prep/sources/where.py``); empty: all."""
    classes: tuple[str, ...] = field(default=(), init=False)
    total: int | None = field(default=None, init=False)
    left_out: int = field(default=0, init=False)
    """Rows that ``where`` does not take."""
    positional: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.tables = [p for table in self.tables for p in _files(str(table))]
        c = self.columns
        self._where = Where(self.where) if self.where else None
        filtered = self._where.columns if self._where else ()
        wanted = {name for name in (c.image, *c.caption, c.label, c.key, c.expected, *filtered) if name}
        for path in self.tables:
            there = _header(path)
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
            counts = [_count(path) for path in self.tables]
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
            for row in _rows(path, columns):
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
            for row in _rows(path):
                kept = self._where.keeps(row) if self._where else True
                if kept is not False:
                    yield self._record(place, row, root, path, kept if isinstance(kept, str) else "")
                place += 1

    def _record(self, place: int, row: Row, root: str, table: str, problem: str) -> Record:
        c = self.columns
        payload, identity, stamp = self._image(row, root, table)
        found = cell_label(row.get(c.label), self._names[table]) if c.label else None
        label, wrong = self._classes.look_up(found)
        if (problem or wrong) and not isinstance(payload, Failed):
            payload = Failed(problem or f"column {c.label!r}: {wrong}")
        captions = dict(_captions(row, c.caption))
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

    def _image(self, row: Row, root: str, table: str) -> tuple[Payload, str, str]:
        """Payload, identity and stamp of a row's image."""
        value = row.get(self.columns.image)
        named = ""
        if _BROKEN in row:
            return Failed(str(row[_BROKEN])), f"{os.path.basename(table)}: {row[_BROKEN]}", "broken"
        if isinstance(value, Mapping):
            table_cell = cast("Mapping[str, Any]", value)
            named = _text(table_cell.get("path"))
            value = table_cell.get("bytes") or named
        if isinstance(value, str) and value.startswith("base64:"):
            try:
                value = base64.b64decode(value[7:], validate=True)
            except binascii.Error as error:
                return Failed(f"not base64: {error}"), value[:80], "broken"
        if isinstance(value, bytes):
            digest = hashlib.sha256(value).hexdigest()
            return Inline(value), named or digest, digest
        text = _text(value)
        if not text:
            return Failed(f"nothing in column {self.columns.image!r}"), f"{os.path.basename(table)}: empty", "empty"
        return self._named(text, row, root)

    def _named(self, text: str, row: Row, root: str) -> tuple[Payload, str, str]:
        """The same for an image that the row names."""
        if places.is_url(root) and (text.startswith(f"{root.rstrip('/')}/") or not places.is_url(text)):
            url = places.inside(text, root)
            payload = Failed(f"outside of {root}") if url is None else UrlFile(url)
            return payload, text, ""
        if places.is_url(text):
            expected = _text(row.get(self.columns.expected)) if self.columns.expected else ""
            return Remote(text, expected), text, expected
        return inside_folder(text, root)


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


def _captions(row: Row, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Extension and text of each caption; a cell with a list holds several."""
    for i, name in enumerate(columns):
        value = row.get(name)
        texts = [_text(v) for v in cast("list[Any]", value)] if isinstance(value, list) else [_text(value)]
        for j, text in enumerate(t for t in texts if t):
            prefix = [_stem(name)] * (i > 0) + [str(j)] * (j > 0)
            yield ".".join([*prefix, "txt"]), text


def _stem(column: str) -> str:
    """What a further caption's column is called in a file's name."""
    return "".join(ch if ch.isalnum() and ch.isascii() else "_" for ch in column).lower()[:40]


def _kind(path: str) -> str:
    suffixes = [s.lower() for s in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise ConfigError(f"{path}: not a table; known are {', '.join(KINDS)}, and the text ones with .gz")
    return kind


def _files(path: str) -> list[str]:
    """A table, or the tables of a folder by name."""
    if not places.is_folder(path):
        if not places.exists(path):
            raise DataError(f"no table at {path}")
        _kind(path)
        return [path]
    names = [name for name, _ in places.listing(path)[0]]
    found = [f"{path.rstrip('/')}/{n}" for n in names if set(KINDS) & set(PurePosixPath(n.lower()).suffixes[-2:])]
    if not found:
        raise DataError(f"no tables in {path}; known are {', '.join(KINDS)}")
    return found


@contextmanager
def _open(path: str) -> Iterator[TextIO]:
    with ExitStack() as stack:
        binary = stack.enter_context(places.opened(path))
        if path.lower().endswith(".gz"):
            binary = stack.enter_context(gzip.GzipFile(fileobj=binary))
        plain = cast("BinaryIO", binary)
        yield stack.enter_context(io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace", newline=""))


def _header(path: str) -> list[str]:
    """Column names; of JSON lines, those that occur in the first rows."""
    kind = _kind(path)
    if kind == "parquet":
        with _parquet(path) as table:
            return list(table.schema_arrow.names)
    if kind == "jsonl":
        return list(dict.fromkeys(name for row in islice(_rows(path), HEADER_ROWS) for name in row if name != _BROKEN))
    with _open(path) as f:
        return next(csv.reader(f, delimiter="\t" if kind == "tsv" else ","), [])


def _count(path: str) -> int | None:
    """About how many rows a table has, without reading all of a text file."""
    if _kind(path) == "parquet":
        with _parquet(path) as table:
            return table.metadata.num_rows
    if path.lower().endswith(".gz"):
        return None
    with places.opened(path) as f:
        beginning = f.read(32 * 1024)
        size = f.seek(0, os.SEEK_END)
    return beginning.count(b"\n") * size // max(1, len(beginning))


def _class_names(path: str, column: str) -> tuple[str, ...]:
    """The names of a label column's classes, where a Parquet file holds them."""
    if not column or _kind(path) != "parquet":
        return ()
    with _parquet(path) as table:
        return listed_names((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"), column)


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow: install sluice[prep]") from error
    with places.opened(path) as f:
        try:
            table = parquet.ParquetFile(f, buffer_size=BUFFER, pre_buffer=False)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a whole Parquet file: {error}") from error
        with table:
            yield table


def _rows(path: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of one table, one at a time; ``columns`` may spare a Parquet file reading the others."""
    kind = _kind(path)
    if kind == "parquet":
        with _parquet(path) as table:
            for batch in table.iter_batches(PARQUET_ROWS, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
        return
    try:
        with _open(path) as f:
            yield from _json_rows(f) if kind == "jsonl" else _csv_rows(f, "\t" if kind == "tsv" else ",")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no whole gzip file: {error}") from error


def _json_rows(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = {_BROKEN: f"line {number} is not JSON: {error}"}
        yield row if isinstance(row, dict) else {_BROKEN: f"line {number} is no table"}


def _csv_rows(f: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(CELL)
    reader = csv.reader(f, delimiter=delimiter)
    names = next(reader, [])
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield {_BROKEN: f"line {reader.line_num}: {error}"}
            continue
        if not cells:
            continue
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        else:
            yield {_BROKEN: f"line {reader.line_num} has {len(cells)} cells, the header {len(names)}"}
