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
    """Samples that were read together. R of them."""

    rows: Ints
    """int64[R], their places among the numbers asked for."""
    found: list[Members | SampleError]


class _Rows(NamedTuple):
    """Where the wanted fields of some samples of one shard lie. R samples, F fields; -1 where absent."""

    rows: Ints
    shard: int
    inside: Ints
    """int64[R], number in the shard."""
    offset: Ints
    size: Ints
    crc32: Ints | None

    def take(self, chosen: Ints) -> _Rows:
        """Some of the samples."""
        tables = (None if t is None else t[chosen] for t in (self.inside, self.offset, self.size, self.crc32))
        return _Rows(self.rows[chosen], self.shard, *tables)  # type: ignore[arg-type]


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
        self._indexes: OrderedDict[int, tuple[Ints, Ints, Ints | None]] = OrderedDict()

    def read(self, ids: Ints) -> Iterator[Read]:
        """The members of samples, a few at a time; all are delivered, in any order.

        Raises:
            DataError: a shard or its index is missing or damaged.
        """
        shards = np.searchsorted(self._starts, ids, "right") - 1
        for shard in np.unique(shards):
            where = self._where(int(shard), np.flatnonzero(shards == shard), ids)
            where = where.take(np.argsort(where.offset[:, 0], kind="stable"))
            for part in self._parts(where):
                yield self._fetch(part)

    def error(self, sample: int, reason: str) -> SampleError:
        """An error that names shard and key of a sample."""
        number = int(np.searchsorted(self._starts, sample, "right")) - 1
        shard = self._manifest.shards[number]
        return SampleError(shard.name, load_index(self._manifest, shard).keys[sample - self._starts[number]], reason)

    def prefetch(self, ids: Ints) -> None:
        """Samples that will be read soon."""
        shards = np.unique(np.searchsorted(self._starts, ids, "right") - 1)
        self._storage.prefetch([self._manifest.shards[i] for i in shards.tolist()])

    def close(self) -> None:
        """Release files."""
        self._storage.close()

    def _where(self, shard: int, rows: Ints, ids: Ints) -> _Rows:
        """Look samples of one shard up in its index; the least recently used indexes are dropped."""
        if shard not in self._indexes:
            index = load_index(self._manifest, self._manifest.shards[shard])
            tables = (index.offset, index.size, index.crc32)
            self._indexes[shard] = tables
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        inside = ids[rows] - self._starts[shard]
        cut = (None if t is None else t[inside] for t in self._indexes[shard])
        return _Rows(rows, shard, inside, *cut)  # type: ignore[arg-type]

    def _parts(self, where: _Rows) -> Iterator[_Rows]:
        """Cut samples into parts that fit the budget."""
        total = np.cumsum(where.size.clip(min=0).sum(1))
        part = (total - 1) // self._budget
        for number in np.unique(part):
            yield where.take(np.flatnonzero(part == number))

    def _fetch(self, where: _Rows) -> Read:
        """Read one part, neighbours in one go, then check the members and take them apart."""
        offset = where.offset[:, self._columns]
        usable = np.flatnonzero((offset[:, : self._needed] >= 0).all(1) & (offset >= 0).any(1))
        found: list[Members | SampleError | None] = [None] * len(where.rows)
        if len(usable):
            offset, size = offset[usable], where.size[usable][:, self._columns]
            have = offset >= 0
            begin = np.where(have, offset, np.iinfo(np.int64).max).min(1) - BLOCK
            end = np.where(have, offset + size, 0).max(1)
            new = np.concatenate([[True], begin[1:] - np.maximum.accumulate(end)[:-1] > _GAP])
            starts, stops = begin[new], np.maximum.reduceat(end, np.flatnonzero(new))
            shard = self._manifest.shards[where.shard]
            buffer = self._storage.read(shard, starts.tolist(), stops.tolist())
            before = np.concatenate([[0], np.cumsum(stops - starts)[:-1]])
            at = offset + (before - starts)[np.cumsum(new) - 1][:, None]
            problems = header_problems(buffer, np.where(have, at, BLOCK), np.where(have, size, -1))
            checks = None if where.crc32 is None else where.crc32[usable][:, self._columns].tolist()
            data = buffer.data
            for i, (row, ats, sizes) in enumerate(zip(usable.tolist(), at.tolist(), size.tolist(), strict=True)):
                members = {f: data[a : a + n] for f, a, n in zip(self._fields, ats, sizes, strict=True) if n >= 0}
                bad = problems.get(i) or (checks and self._rotten(members, checks[i]))
                found[row] = self._error(where, row, bad) if bad else members
        return Read(where.rows, [self._absent(where, row) if f is None else f for row, f in enumerate(found)])

    def _rotten(self, members: Members, checks: Sequence[int]) -> str | None:
        """Which field is not what was indexed."""
        for name, check in zip(self._fields, checks, strict=True):
            if name in members and zlib.crc32(members[name]) != check:
                return f"field {name!r} is not what was indexed (wrong CRC-32)"
        return None

    def _error(self, where: _Rows, row: int, reason: str) -> SampleError:
        return self.error(int(self._starts[where.shard] + where.inside[row]), reason)

    def _absent(self, where: _Rows, row: int) -> SampleError:
        """The error of a sample that lacks a wanted field."""
        names = [name for name, at in zip(self._manifest.fields, where.offset[row], strict=True) if at >= 0]
        lacking = " or ".join(repr(f) for f in self._fields[: self._needed] or self._fields if f not in names)
        return self._error(where, row, f"it has no field {lacking}, only {', '.join(names) or 'nothing'}")


def _octal(text: np.ndarray) -> Ints:
    """Numbers written in octal, [N,K] characters to int64[N]; -1 where there is no digit."""
    value, seen = np.zeros(len(text), np.int64), np.zeros(len(text), bool)
    for column in text.T:
        digit = (column >= ord("0")) & (column < ord("8"))
        value = np.where(digit, value * 8 + column - ord("0"), value)
        seen |= digit
    return np.where(seen, value, -1)


def header_problems(buffer: np.ndarray, at: Ints, size: Ints) -> dict[int, str]:
    """Which samples have a member with a bad tar header, and what is wrong with it.

    Args:
        buffer: uint8, the bytes read.
        at: int64[R,F], where the members' data begin in it, each right after its header.
        size: int64[R,F], bytes of the data, as the index says; -1 where there is no member.
    """
    headers = buffer[at.reshape(-1, 1) + np.arange(-BLOCK, 0)]
    field = headers[:, _CHECKSUM]
    checksum = headers.sum(1, dtype=np.int64) - field.sum(1, dtype=np.int64) + ord(" ") * field.shape[1]
    written = _octal(field)
    # Sizes of 8 GiB and more are in binary, marked by the highest bit.
    other = (_octal(headers[:, _SIZE]) != size.reshape(-1)) & (headers[:, _SIZE.start] < 0x80)
    tests = (
        (written < 0, "it has no tar header before its data"),
        (written != checksum, "a tar header has a wrong checksum"),
        (other, "a tar header says another size than the index"),
    )
    problems: dict[int, str] = {}
    for bad, words in tests:
        for member in np.flatnonzero(bad & (size.reshape(-1) >= 0)).tolist():
            problems.setdefault(member // at.shape[1], words)
    return problems
