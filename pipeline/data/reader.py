"""Reading samples out of tars by the offsets in their index, a batch at a time, with checks on every member."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest, load_index
from pipeline.data.order import Ints
from pipeline.data.storage import Storage

BLOCK = 512
_INDEXES = 256
_GAP = 8 * BLOCK
"""Bytes between members that are read along rather than skipped."""
_NOWHERE = np.iinfo(np.int64).max
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
"""Of a tar header."""

Members = dict[str, memoryview]
"""Field to content; the memory may be written to."""


class SampleError(DataError):
    """One sample that cannot be used; its shard may be fine otherwise."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}, sample {key!r}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str]]:
        return SampleError, (self.shard, self.key, self.reason)


class Read(NamedTuple):
    """Samples that were read together. R of them. The members' memory is used again for the next ones."""

    rows: Ints
    """int64[R], their places among the numbers asked for."""
    found: list[Members | SampleError]


class _Table(NamedTuple):
    """Where the fields of some samples lie, sorted by shard and place in it. R samples, F fields of the manifest."""

    rows: Ints
    shard: Ints
    offset: Ints
    """int64[R,F]; -1 where absent, as in the next two."""
    size: Ints
    crc32: Ints
    """-1 also where the index has none."""

    def take(self, chosen: Ints | slice) -> _Table:
        """Some of the samples."""
        return _Table(*(t[chosen] for t in self))


class Reader:
    """Samples of a data set by number.

    Args:
        manifest: the data set.
        fields: fields that each sample must have.
        optional: fields that are read where a sample has them.
        storage: where the shards are.
        budget: bytes of samples that are held at a time; one sample may exceed it.
    """

    def __init__(
        self, manifest: Manifest, fields: Sequence[str], optional: Sequence[str], storage: Storage, budget: int
    ) -> None:
        self._manifest = manifest
        self._starts = np.array(manifest.starts, np.int64)
        names = list(manifest.fields)
        self._fields = [*fields, *optional]
        self._needed = len(fields)
        self._columns = [names.index(name) for name in self._fields]
        self._storage = storage
        self._budget = budget
        self._buffer = np.empty(0, np.uint8)
        self._indexes: OrderedDict[int, tuple[Ints, Ints, Ints]] = OrderedDict()

    def read(self, ids: Ints) -> Iterator[Read]:
        """The members of samples, a few at a time; all are delivered, in any order.

        Raises:
            DataError: a shard or its index is missing or damaged.
        """
        table = self._table(ids)
        total = np.cumsum(table.size.clip(min=0).sum(1))
        cuts = np.searchsorted(total, np.arange(self._budget, total[-1] + self._budget, self._budget), "right")
        begin = 0
        for end in [*cuts.tolist(), len(ids)]:
            end = max(end, begin + 1)
            if begin < len(ids):
                yield self._fetch(table.take(slice(begin, end)), ids)
            begin = end

    def error(self, sample: int, reason: str) -> SampleError:
        """An error that names shard and key of a sample."""
        number = int(np.searchsorted(self._starts, sample, "right")) - 1
        shard = self._manifest.shards[number]
        where = f"{self._manifest.root.rstrip('/')}/{shard.name}"
        return SampleError(where, load_index(self._manifest, shard).keys[sample - self._starts[number]], reason)

    def prefetch(self, ids: Ints) -> None:
        """Samples that will be read soon."""
        shards = np.unique(np.searchsorted(self._starts, ids, "right") - 1)
        self._storage.prefetch([self._manifest.shards[i] for i in shards.tolist()])

    def close(self) -> None:
        """Release files."""
        self._storage.close()

    def _index(self, shard: int) -> tuple[Ints, Ints, Ints]:
        """Offsets, sizes and CRC-32 of a shard's members; the least recently used indexes are dropped."""
        if shard not in self._indexes:
            index = load_index(self._manifest, self._manifest.shards[shard])
            crc32 = np.full_like(index.size, -1) if index.crc32 is None else index.crc32
            self._indexes[shard] = (index.offset, index.size, crc32)
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _table(self, ids: Ints) -> _Table:
        """Look samples up in the indexes of their shards."""
        shard = np.searchsorted(self._starts, ids, "right") - 1
        shape = (len(ids), len(self._manifest.fields))
        offset, size, crc32 = (np.empty(shape, np.int64) for _ in range(3))
        for number in np.unique(shard).tolist():
            rows = np.flatnonzero(shard == number)
            inside = ids[rows] - self._starts[number]
            offset[rows], size[rows], crc32[rows] = (t[inside] for t in self._index(number))
        order = np.lexsort((offset.max(1, initial=-1), shard))
        return _Table(order, shard[order], offset[order], size[order], crc32[order])

    def _fetch(self, table: _Table, ids: Ints) -> Read:
        """Read some samples, neighbours in one go, then check the members and take them apart."""
        offset = table.offset[:, self._columns]
        usable = np.flatnonzero((offset[:, : self._needed] >= 0).all(1) & (offset >= 0).any(1))
        found: list[Members | SampleError | None] = [None] * len(table.rows)
        if len(usable):
            part = table.take(usable)
            offset, size, crc32 = (t[:, self._columns] for t in part[2:])
            have = offset >= 0
            data, at = self._load(part.shard, np.where(have, offset, _NOWHERE), np.where(have, size, 0))
            problems = header_problems(np.frombuffer(data, np.uint8), np.where(have, at, BLOCK), size)
            checks = crc32.tolist() if (crc32 >= 0).any() else None
            places = zip(at.T.tolist(), (at + size).T.tolist(), strict=True)
            columns = [[data[a:b] for a, b in zip(*column, strict=True)] for column in places]
            absent = None if have.all() else ~have
            for i, (row, values) in enumerate(zip(usable.tolist(), zip(*columns, strict=True), strict=True)):
                members = dict(zip(self._fields, values, strict=True))
                for field in () if absent is None else np.flatnonzero(absent[i]):
                    del members[self._fields[field]]
                bad = problems.get(i) or (checks and self._rotten(members, checks[i]))
                found[row] = self._error(table, row, ids, bad) if bad else members
        return Read(table.rows, [self._absent(table, row, ids) if f is None else f for row, f in enumerate(found)])

    def _load(self, shard: Ints, offset: Ints, size: Ints) -> tuple[memoryview, Ints]:
        """Read members; their bytes, and where in them each member's data begin."""
        begin, end = offset.min(1) - BLOCK, np.where(offset < _NOWHERE, offset + size, 0).max(1)
        new = np.concatenate([[True], (np.diff(shard) > 0) | (begin[1:] - end[:-1] > _GAP) | (begin[1:] < end[:-1])])
        spans = np.flatnonzero(new)
        starts, stops = begin[spans], np.maximum.reduceat(end, spans)
        place = np.concatenate([[0], np.cumsum(stops - starts)])
        if len(self._buffer) < place[-1]:
            self._buffer = np.empty(place[-1], np.uint8)
        data, of_span = self._buffer.data, shard[spans]
        for number in np.unique(of_span).tolist():
            low, high = np.searchsorted(of_span, [number, number + 1]).tolist()
            self._storage.read(
                self._manifest.shards[number],
                starts[low:high].tolist(),
                stops[low:high].tolist(),
                data[place[low] : place[high]],
            )
        return data[: place[-1]], offset + (place[:-1] - starts)[np.cumsum(new) - 1][:, None]

    def _rotten(self, members: Members, checks: Sequence[int]) -> str | None:
        """Which field is not what was indexed."""
        for name, check in zip(self._fields, checks, strict=True):
            if check >= 0 and zlib.crc32(members[name]) != check:
                return f"field {name!r} is not what was indexed (wrong CRC-32)"
        return None

    def _error(self, table: _Table, row: int, ids: Ints, reason: str) -> SampleError:
        return self.error(int(ids[table.rows[row]]), reason)

    def _absent(self, table: _Table, row: int, ids: Ints) -> SampleError:
        """The error of a sample that lacks a wanted field."""
        names = [name for name, at in zip(self._manifest.fields, table.offset[row], strict=True) if at >= 0]
        lacking = " or ".join(repr(f) for f in self._fields[: self._needed] or self._fields if f not in names)
        return self._error(table, row, ids, f"it has no field {lacking}, only {', '.join(names) or 'nothing'}")


def _unlike(text: np.ndarray, digits: int, value: Ints) -> list[int]:
    """Rows whose text is not the value written in octal in the form that nearly all writers use.

    Args:
        text: uint8[N,K] characters.
        digits: how many there are, from the first character on; another one after them would be another number.
        value: int64[N].
    """
    usual = (value[:, None] >> 3 * np.arange(digits - 1, -1, -1) & 7) + ord("0")
    return np.flatnonzero((text[:, :digits] != usual).any(1) | ((text[:, digits] >> 3) == ord("0") >> 3)).tolist()


def _number(text: np.ndarray) -> int | None:
    """A number written in octal, uint8[K] characters, padded with blanks or zero bytes in any way."""
    words = bytes(text).strip(b"\0 ")
    return int(words, 8) if words and set(words) <= set(b"01234567") else None


def _sums(rows: np.ndarray) -> Ints:
    """The sum of the bytes of each row, uint8[N,BLOCK] to int64[N]: four sums at a time in each 64-bit word."""
    words, mask = rows.view(np.uint64), np.uint64(0x00FF00FF00FF00FF)
    four = ((words & mask) + ((words >> np.uint64(8)) & mask)).sum(1)
    return four.view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int64)


def header_problems(buffer: np.ndarray, at: Ints, size: Ints) -> dict[int, str]:
    """Which samples have a member with a bad tar header, and what is wrong with it.

    Args:
        buffer: uint8, the bytes read.
        at: int64[R,F], where the members' data begin in it, each right after its header.
        size: int64[R,F], bytes of the data, as the index says; -1 where there is no member.
    """
    blocks = np.ndarray((len(buffer) - BLOCK + 1, BLOCK), np.uint8, buffer, strides=(1, 1))
    headers, sizes = blocks[at.ravel() - BLOCK], size.ravel()
    field, sized = headers[:, _CHECKSUM], headers[:, _SIZE]
    # The checksum counts its own place as blanks.
    checksum = _sums(headers) - field.sum(1, dtype=np.int64) + ord(" ") * field.shape[1]
    problems: dict[int, str] = {}
    for member in _unlike(field, 6, checksum):
        written = _number(field[member])
        if sizes[member] >= 0 and written != checksum[member]:
            words = "it has no tar header before its data" if written is None else "a tar header has a wrong checksum"
            problems.setdefault(member // at.shape[1], words)
    for member in _unlike(sized, 11, sizes):
        # Sizes of 8 GiB and more are in binary, marked by the highest bit.
        if sizes[member] >= 0 and sized[member, 0] < 0x80 and _number(sized[member]) != sizes[member]:
            problems.setdefault(member // at.shape[1], "a tar header says another size than the index")
    return problems
