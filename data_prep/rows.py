"""The rows of tables: CSV, TSV, JSON lines and Parquet, streamed. A row that cannot be read says so and is no end.

Text is UTF-8, or what its byte-order mark says. Cells of CSV and TSV are quoted as RFC 4180 says; a quote that nothing
closes as it says, as in captions that only begin with one, is a letter like others, so that no row is lost in it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from data_prep import places
from data_prep.text import ADVICE, encoding_of
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import join

KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PARQUET_ROWS = 32
"""Rows that are turned into Python objects together."""
BUFFER = 1024**2
"""Bytes of each Parquet column that are read at once; without such a limit whole row groups are held in memory."""
LINE = 256 * 1024**2
"""Longest line of a text table."""
LINES = 1000
"""Most lines of a quoted cell."""
HEADER_ROWS = 1000
"""Rows of JSON lines in which a column must occur."""
BROKEN = "\0broken"
"""Column that stands for a row that could not be read; its value is why."""

Row = Mapping[str, Any]
_QUOTED = {sign: re.compile(rf'"([^"]*+(?:""[^"]*+)*+)"(?={sign}|\Z)') for sign in (",", "\t")}
_OPEN = re.compile(r'"[^"]*+(?:""[^"]*+)*+\Z')


def kind_of(path: str) -> str:
    """What kind of table a name stands for.

    Raises:
        ConfigError: none.
    """
    suffixes = [s.lower() for s in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise ConfigError(f"{path}: not a table; known are {', '.join(KINDS)}, and the text ones with .gz")
    return kind


def tables(path: str) -> list[str]:
    """A table, or the tables of a folder by name; hidden ones are none.

    Raises:
        DataError: none there.
        ConfigError: not a table.
    """
    if not places.is_folder(path):
        if not places.exists(path):
            raise DataError(f"no table at {path}")
        kind_of(path)
        return [path]
    names = [name for name, _ in places.listing(path)[0] if not name.startswith(".")]
    found = [join(path, n) for n in names if set(KINDS) & set(PurePosixPath(n.lower()).suffixes[-2:])]
    if not found:
        raise DataError(f"no tables in {path}; known are {', '.join(KINDS)}")
    return found


def header(path: str) -> list[str]:
    """Column names; of JSON lines, those that occur in the first rows."""
    kind = kind_of(path)
    if kind == "parquet":
        with parquet(path) as table:
            return list(table.schema_arrow.names)
    if kind == "jsonl":
        return list(dict.fromkeys(name for row in islice(rows(path), HEADER_ROWS) for name in row if name != BROKEN))
    with _text(path) as f:
        return _names(_lines(f), _sign(kind), path)


def count(path: str) -> int | None:
    """About how many rows a table has, without reading all of a text file."""
    if kind_of(path) == "parquet":
        with parquet(path) as table:
            return table.metadata.num_rows
    if path.lower().endswith(".gz"):
        return None
    with places.opened(path) as f:
        beginning = f.read(32 * 1024)
        size = f.seek(0, os.SEEK_END)
    return beginning.count(b"\n") * size // max(1, len(beginning))


def rows(path: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of one table, one at a time; ``columns`` may spare a Parquet file reading the others.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    kind = kind_of(path)
    if kind == "parquet":
        with parquet(path) as table:
            yield from _parquet_rows(table, columns)
        return
    try:
        with _text(path) as f:
            yield from _json_rows(_lines(f)) if kind == "jsonl" else _csv_rows(_lines(f), _sign(kind), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {error.encoding.upper()} as it says at its beginning: {error.reason}"
        ) from error


# -- Parquet


@contextmanager
def parquet(path: str) -> Iterator[Any]:
    """A Parquet file, opened.

    Raises:
        ConfigError: pyarrow is missing.
        DataError: not a whole Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow: install sluice[prep]") from error
    with places.opened(path) as f:
        try:
            table = pyarrow.parquet.ParquetFile(f, buffer_size=BUFFER, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a whole Parquet file: {error}") from error
        with table:
            yield table


def _parquet_rows(table: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """Rows; where a file is damaged, one that says so, and its end."""
    batches = table.iter_batches(PARQUET_ROWS, columns=list(columns) if columns else None)
    number = 1
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's, not the file's
                raise
            yield {BROKEN: f"the rows from {number} on are lost: {type(error).__name__}: {error}"}
            return
        yield from _as_python(batch, number)
        number += batch.num_rows


def _as_python(batch: Any, first: int) -> list[Row]:
    try:
        return batch.to_pylist()
    except Exception:  # a time out of Python's range, letters that are no UTF-8: then one by one
        return [_row(batch, i, first + i) for i in range(batch.num_rows)]


def _row(batch: Any, place: int, number: int) -> Row:
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except Exception:
            try:
                row[name] = column[place].cast("string").as_py()
            except Exception as error:
                return {BROKEN: f"row {number}, column {name!r}: {type(error).__name__}: {error}"}
    return row


# -- text


@contextmanager
def _text(path: str) -> Iterator[TextIO]:
    """A text table. Bytes that are no UTF-8 become lone surrogates, by which their line is known."""
    with ExitStack() as stack:
        binary: Any = stack.enter_context(places.opened(path))
        if path.lower().endswith(".gz"):
            binary = stack.enter_context(gzip.GzipFile(fileobj=binary))
        encoding = encoding_of(binary.peek(4)[:4])
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        plain = cast("BinaryIO", binary)
        yield stack.enter_context(io.TextIOWrapper(plain, encoding=encoding, errors=errors, newline=""))


class _Lines:
    """The lines of a text, without their ends, of which some can be put back."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._again: deque[str] = deque()
        self.number = 0
        """Of the last one."""

    def next(self) -> str | None:
        """The next one; None at the end."""
        line = self._again.popleft() if self._again else self._read()
        self.number += 1
        return line or None

    def put_back(self, lines: Iterable[str]) -> None:
        """These come again."""
        several = list(lines)
        self._again.extendleft(reversed(several))
        self.number -= len(several)


def _lines(f: TextIO) -> _Lines:
    return _Lines(lambda: f.readline(LINE))


def _unreadable(line: str, lines: _Lines) -> str:
    """Why a line cannot be used; empty when it can. Of one that is too long the rest is passed over."""
    number = lines.number
    if len(line) >= LINE and not line.endswith(("\n", "\r")):
        while (rest := lines.next()) is not None and not rest.endswith(("\n", "\r")):
            pass
        lines.number = number
        return f"line {number} is longer than {LINE:,} characters"
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            found = ord(line[error.start]) - 0xDC00
            return f"line {number} is not UTF-8 (byte 0x{found:02x}); {ADVICE}"
    return ""


def _json_rows(lines: _Lines) -> Iterator[Row]:
    while (line := lines.next()) is not None:
        if not line.strip():
            continue
        wrong = _unreadable(line, lines)
        try:
            row = {BROKEN: wrong} if wrong else json.loads(line)
        except (ValueError, RecursionError) as error:
            row = {BROKEN: f"line {lines.number} is not JSON: {error}"}
        yield row if isinstance(row, dict) else {BROKEN: f"line {lines.number} is no table"}


def _sign(kind: str) -> str:
    return "\t" if kind == "tsv" else ","


def _names(lines: _Lines, sign: str, path: str) -> list[str]:
    line = lines.next() or ""
    wrong = _unreadable(line, lines)
    if wrong:
        raise DataError(f"{path}: {wrong}")
    return _record(line, lines, sign, 0) if line.strip("\r\n") else []


def _csv_rows(lines: _Lines, sign: str, path: str) -> Iterator[Row]:
    names = _names(lines, sign, path)
    while (line := lines.next()) is not None:
        if not line.strip("\r\n"):
            continue
        number = lines.number
        wrong = _unreadable(line, lines)
        if wrong:
            yield {BROKEN: wrong}
            continue
        if '"' in line:
            cells = _record(line, lines, sign, len(names))
            wrong = _unreadable(sign.join(cells), lines)
        else:
            cells = line.rstrip("\r\n").split(sign)
        if wrong:
            yield {BROKEN: wrong}
        elif len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        else:
            yield {BROKEN: f"line {number} has {len(cells)} cells, the header {len(names)}"}


def _record(line: str, lines: _Lines, sign: str, width: int) -> list[str]:
    """The cells of a record that begins with ``line``, and perhaps goes on for more."""
    first = _cells(line.rstrip("\r\n"), sign)
    more: list[str] = []
    found = first
    while found.is_open and len(more) < LINES and (following := lines.next()) is not None:
        more.append(following)
        if '"' in following:
            found = _cells("".join((line, *more)).rstrip("\r\n"), sign)
    whole = not (found.is_open or found.is_torn or (width and len(found.cells) != width))
    alone = width > 1 and len(first.cells) == width and _are_rows(more, sign, width)
    if not more or (whole and not alone):
        return found.cells
    lines.put_back(more)
    return first.cells


def _are_rows(more: list[str], sign: str, width: int) -> bool:
    """Whether lines within quotes look like rows of the table: the quote was then closed by another one's by chance.

    Tabs are hardly ever within a cell; commas are, but not on each of several lines just as often as in a row.
    """
    least = 1 if sign == "\t" else 2
    quotes = sum(line.count('"') for line in more)
    return quotes == 1 and len(more) >= least and all(line.count(sign) == width - 1 for line in more)


class _Cells(NamedTuple):
    """What a text is as a record."""

    cells: list[str]
    is_open: bool = False
    """A cell begins with a quote that is not closed before the end; it is taken literally here."""
    is_torn: bool = False
    """There is an end of a line in a cell that is not quoted."""


def _cells(text: str, sign: str) -> _Cells:
    cells: list[str] = []
    at, is_open, is_torn = 0, False, False
    while True:
        if text.startswith('"', at):
            match = _QUOTED[sign].match(text, at)
            if match:
                cells.append(match[1].replace('""', '"'))
                at = match.end() + 1
                if at > len(text):
                    return _Cells(cells, is_open, is_torn)
                continue
            is_open = is_open or _OPEN.match(text, at) is not None
        end = text.find(sign, at)
        cells.append(text[at:] if end < 0 else text[at:end])
        is_torn = is_torn or "\n" in cells[-1] or "\r" in cells[-1]
        if end < 0:
            return _Cells(cells, is_open, is_torn)
        at = end + 1
