"""Reading samples out of tars by the offsets in their index, a batch at a time, with checks on every member."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest, Shard, ShardIndex, load_index
from pipeline.data.order import Ints
from pipeline.data.storage import Ranges, Storage

BLOCK = 512
_INDEXES = 256
_GAP = 8 * BLOCK
"""Bytes between members that are read along rather than skipped."""
_NOWHERE = np.iinfo(np.int64).max
_OFFSETS, _SIZES, _CHECKS = range(3)
"""Of a table of members."""
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


class _Part(NamedTuple):
    """Samples that are read together, in ascending order. R of them."""

    rows: Ints
    """int64[R], their places among the numbers asked for."""
    ids: Ints
    """int64[R]."""
    shard: Ints
    """int64[R], their shards."""
    table: Ints
    """int64[R,3,F]: offset, size and CRC-32 of the F wanted fields. -1 where a sample lacks the field, and where the
    index has no CRC-32."""

    def take(self, chosen: Ints | slice) -> _Part:
        """Some of them."""
        return _Part(*(t[chosen] for t in self))


class _Spans(NamedTuple):
    """Where the members of R samples are read to."""

    ranges: list[Ranges]
    """Their bytes come to lie one after the other."""
    rows: list[slice]
    """Which samples lie in each of them."""
    shift: Ints
    """int64[R], from places in the shard to places in memory."""


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
        self._budget = max(1, budget // storage.copies)
        self._buffer = np.empty(0, np.uint8)
        self._indexes: OrderedDict[int, Ints] = OrderedDict()

    def read(self, ids: Ints) -> Iterator[Read]:
        """The members of samples, a few at a time; all are delivered, in any order.

        Raises:
            DataError: a shard or its index is missing or damaged.
        """
        for part in self._parts(ids):
            yield Read(part.rows, self._fetch(part))

    def expect(self, ids: Ints) -> None:
        """These will be asked for after the ones that are read now.

        Raises:
            DataError: the index of a shard is missing or damaged.
        """
        part = next(self._parts(ids))
        usable = self._usable(part.table[:, _OFFSETS] >= 0)
        self._storage.expect(self._spans(part.take(usable)).ranges if len(usable) else [])

    def error(self, sample: int, reason: str) -> SampleError:
        """An error that names shard and key of a sample."""
        shard, index, row = self._entry(sample)
        return SampleError(f"{self._manifest.root.rstrip('/')}/{shard.name}", index.keys[row], reason)

    def prefetch(self, ids: Ints) -> None:
        """The shards of these samples will be read soon."""
        shards = np.unique(np.searchsorted(self._starts, ids, "right") - 1)
        self._storage.prefetch([self._manifest.shards[i] for i in shards.tolist()])

    def close(self) -> None:
        """Release files."""
        self._storage.close()

    def _entry(self, sample: int) -> tuple[Shard, ShardIndex, int]:
        """A sample's shard, the shard's index, and the sample's row in it."""
        number = int(np.searchsorted(self._starts, sample, "right")) - 1
        shard = self._manifest.shards[number]
        return shard, load_index(self._manifest, shard), sample - int(self._starts[number])

    def _index(self, shard: int) -> Ints:
        """int64[S,3,F], see :class:`_Part`, of a shard's S samples; the least recently used are dropped."""
        if shard not in self._indexes:
            index = load_index(self._manifest, self._manifest.shards[shard])
            checks = np.full_like(index.size, -1) if index.crc32 is None else index.crc32
            self._indexes[shard] = np.stack([t[:, self._columns] for t in (index.offset, index.size, checks)], 1)
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _parts(self, ids: Ints) -> Iterator[_Part]:
        """Cut samples into parts that fit into the budget."""
        order = np.argsort(ids, kind="stable")
        whole = _Part(order, ids[order], *self._table(ids[order]))
        total = np.cumsum(whole.table[:, _SIZES].clip(min=0).sum(1))
        cuts = np.searchsorted(total, np.arange(self._budget, total[-1] + self._budget, self._budget), "right")
        begin = 0
        for end in [*cuts.tolist(), len(ids)]:
            end = max(end, begin + 1)
            if begin < len(ids):
                yield whole.take(slice(begin, end))
            begin = end

    def _table(self, ids: Ints) -> tuple[Ints, Ints]:
        """Shards and members of samples in ascending order, see :class:`_Part`."""
        shard = np.searchsorted(self._starts, ids, "right") - 1
        table = np.empty((len(ids), 3, len(self._fields)), np.int64)
        cuts = [0, *(np.flatnonzero(_changes(shard)) + 1).tolist(), len(ids)]
        for begin, end in pairwise(cuts):
            number = int(shard[begin])
            table[begin:end] = self._index(number)[ids[begin:end] - self._starts[number]]
        return shard, table

    def _usable(self, have: np.ndarray) -> Ints:
        """Which samples have all fields that are needed, and at least one; ``have`` is bool[R,F]."""
        return np.flatnonzero(have[:, : self._needed].all(1) & have.any(1))

    def _fetch(self, part: _Part) -> list[Members | SampleError]:
        """Read some samples, neighbours in one go, then check the members and take them apart."""
        usable = self._usable(part.table[:, _OFFSETS] >= 0)
        if len(usable) == len(part.ids):
            return self._take_apart(part)
        found: dict[int, Members | SampleError] = {}
        if len(usable):
            found = dict(zip(usable.tolist(), self._take_apart(part.take(usable)), strict=True))
        return [found.get(row) or self._absent(sample) for row, sample in enumerate(part.ids.tolist())]

    def _take_apart(self, part: _Part) -> list[Members | SampleError]:
        """The members of samples that have at least one."""
        offset, size, promised = part.table[:, _OFFSETS], part.table[:, _SIZES], part.table[:, _CHECKS]
        have, is_checked = offset >= 0, promised >= 0
        spans = self._spans(part)
        at = np.where(have, offset + spans.shift[:, None], BLOCK)
        data = self._memory(sum(r.bytes for r in spans.ranges))
        places = zip(at.T.tolist(), (at + size).T.tolist(), strict=True)
        columns = [[data[a:b] for a, b in zip(*column, strict=True)] for column in places]
        found_checks: list[list[int]] = [[] for _ in columns if is_checked.any()]
        begin = 0
        for ranges, rows in zip(spans.ranges, spans.rows, strict=True):
            self._storage.read(ranges, data[begin : begin + ranges.bytes])
            begin += ranges.bytes
            # At once, while the bytes are near the processor.
            for column, checks in zip(columns, found_checks, strict=False):
                checks += [crc32(member) for member in column[rows]]
        problems = header_problems(np.frombuffer(data, np.uint8), at, size)
        if found_checks:
            for row, column in np.argwhere(is_checked & (promised != np.array(found_checks).T)).tolist():
                problems.setdefault(row, f"field {self._fields[column]!r} is not what was indexed (wrong CRC-32)")
        members = [dict(zip(self._fields, values, strict=True)) for values in zip(*columns, strict=True)]
        for row, column in () if have.all() else np.argwhere(~have).tolist():
            del members[row][self._fields[column]]
        found: list[Members | SampleError] = [*members]
        for row, reason in problems.items():
            found[row] = self.error(int(part.ids[row]), reason)
        return found

    def _spans(self, part: _Part) -> _Spans:
        """The bytes to read for some samples: what lies near each other in a shard is one span."""
        offset, size = part.table[:, _OFFSETS], part.table[:, _SIZES]
        begin, end = np.where(offset >= 0, offset, _NOWHERE).min(1) - BLOCK, (offset + size).max(1)
        other = _changes(part.shard) | _changes(np.cumsum(end - begin) // self._storage.piece)
        apart = other | (begin[1:] - end[:-1] > _GAP) | (begin[1:] < end[:-1])
        is_first = np.concatenate([[True], apart])
        first = np.flatnonzero(is_first)
        starts, stops = begin[first], np.maximum.reduceat(end, first)
        shift = np.cumsum(stops - starts) - stops
        # Each range begins with a span.
        rows = [0, *(np.flatnonzero(other) + 1).tolist(), len(part.ids)]
        cuts = np.searchsorted(first, rows).tolist()
        ranges = [
            Ranges(self._manifest.shards[part.shard[row]], starts[low:high].tolist(), stops[low:high].tolist())
            for row, (low, high) in zip(rows, pairwise(cuts), strict=False)
        ]
        return _Spans(ranges, [slice(*ends) for ends in pairwise(rows)], shift[np.cumsum(is_first) - 1])

    def _memory(self, size: int) -> memoryview:
        """Memory that is used again the next time."""
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer.data[:size]

    def _absent(self, sample: int) -> SampleError:
        """The error of a sample that lacks a wanted field."""
        _, index, row = self._entry(sample)
        names = [name for name, at in zip(self._manifest.fields, index.offset[row], strict=True) if at >= 0]
        lacking = " or ".join(repr(f) for f in self._fields[: self._needed] or self._fields if f not in names)
        return self.error(sample, f"it has no field {lacking}, only {', '.join(names) or 'nothing'}")


def _changes(numbers: Ints) -> np.ndarray:
    """bool[N-1], whether each of N numbers differs from the one before; the first has none."""
    return numbers[1:] != numbers[:-1]


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
