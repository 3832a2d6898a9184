"""Reading samples out of tars by the offsets in their index, a batch at a time, with checks on every member."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest
from pipeline.data.headers import BLOCK, header_problems
from pipeline.data.locate import Bools, Layout, Located, Locator, lay_out
from pipeline.data.order import Ints
from pipeline.data.storage import Storage

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
    """int64[R], their positions among the numbers asked for."""
    found: list[Members | SampleError]


class Reader:
    """Samples of a data set by number.

    Args:
        manifest: the data set.
        fields: fields that each sample must have.
        optional: fields that are read where a sample has them.
        storage: where the shards are.
        budget: bytes of samples that are held at a time; one sample may exceed it.
        may_be_bare: a sample without any of the fields is no error where none is needed.
    """

    def __init__(
        self,
        manifest: Manifest,
        fields: Sequence[str],
        optional: Sequence[str],
        storage: Storage,
        budget: int,
        may_be_bare: bool = False,
    ) -> None:
        self._manifest = manifest
        self._fields = [*fields, *optional]
        self._needed = len(fields)
        self._locator = Locator(manifest, self._fields)
        self._storage = storage
        self._budget = max(1, budget // storage.copies)
        self._buffer = np.empty(0, np.uint8)
        self._may_be_bare = may_be_bare

    def read(self, ids: Ints) -> Iterator[Read]:
        """The members of samples, a few at a time; all are delivered, in any order.

        Raises:
            DataError: a shard or its index is missing or damaged.
        """
        for part in self._locator.locate(ids).parts(self._budget):
            yield Read(part.row, self._fetch(part))

    def expect(self, ids: Ints) -> None:
        """These will be asked for after the ones that are read now.

        Raises:
            DataError: the index of a shard is missing or damaged.
        """
        part = next(self._locator.locate(ids).parts(self._budget))
        usable = self._usable(part.is_there)
        self._storage.expect(self._lay_out(part.take(usable)).ranges if len(usable) else [])

    def error(self, sample: int, reason: str) -> SampleError:
        """An error that names shard and key of a sample."""
        shard, index, row = self._locator.entry(sample)
        return SampleError(f"{self._manifest.root.rstrip('/')}/{shard.name}", index.keys[row], reason)

    def prefetch(self, ids: Ints) -> None:
        """The shards of these samples will be read soon."""
        shards = np.unique(self._locator.shards(ids))
        self._storage.prefetch([self._manifest.shards[i] for i in shards.tolist()])

    def close(self) -> None:
        """Release files."""
        self._storage.close()

    def _usable(self, is_there: Bools) -> Ints:
        """Which samples have all fields that are needed, and at least one."""
        return np.flatnonzero(is_there[:, : self._needed].all(1) & is_there.any(1))

    def _fetch(self, part: Located) -> list[Members | SampleError]:
        """Read some samples, neighbours in one go, then check the members and take them apart."""
        usable = self._usable(part.is_there)
        if len(usable) == len(part.id):
            return self._take_apart(part)
        found: dict[int, Members | SampleError] = {}
        if len(usable):
            found = dict(zip(usable.tolist(), self._take_apart(part.take(usable)), strict=True))
        if self._may_be_bare:
            return [found.get(row, {}) for row in range(len(part.id))]
        return [found.get(row) or self._absent(sample) for row, sample in enumerate(part.id.tolist())]

    def _take_apart(self, part: Located) -> list[Members | SampleError]:
        """The members of samples that have at least one."""
        layout = self._lay_out(part)
        at = np.where(part.is_there, part.offset + layout.shift[:, None], BLOCK)
        data = self._memory(sum(r.bytes for r in layout.ranges))
        ends = zip(at.T.tolist(), (at + part.size).T.tolist(), strict=True)
        columns = [[data[a:b] for a, b in zip(*column, strict=True)] for column in ends]
        checks = self._read(layout, data, columns if (part.crc32 >= 0).any() else [])
        problems = header_problems(np.frombuffer(data, np.uint8), at, part.size)
        if checks:
            differs = (part.crc32 >= 0) & (part.crc32 != np.array(checks).T)
            for row, column in np.argwhere(differs).tolist():
                problems.setdefault(row, f"field {self._fields[column]!r} is not what was indexed (wrong CRC-32)")
        members = [dict(zip(self._fields, values, strict=True)) for values in zip(*columns, strict=True)]
        for row, column in () if part.is_there.all() else np.argwhere(~part.is_there).tolist():
            del members[row][self._fields[column]]
        found: list[Members | SampleError] = [*members]
        for row, reason in problems.items():
            found[row] = self.error(int(part.id[row]), reason)
        return found

    def _read(self, layout: Layout, data: memoryview, columns: list[list[memoryview]]) -> list[list[int]]:
        """Read the bytes of samples; the CRC-32 of each of the members, the R of each field."""
        checks: list[list[int]] = [[] for _ in columns]
        begin = 0
        for ranges, rows in zip(layout.ranges, layout.rows, strict=True):
            self._storage.read(ranges, data[begin : begin + ranges.bytes])
            begin += ranges.bytes
            # At once, while the bytes are near the processor.
            for column, own in zip(columns, checks, strict=True):
                own += [crc32(member) for member in column[rows]]
        return checks

    def _lay_out(self, part: Located) -> Layout:
        return lay_out(part, self._manifest.shards, self._storage.piece)

    def _memory(self, size: int) -> memoryview:
        """Memory that is used again the next time."""
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer.data[:size]

    def _absent(self, sample: int) -> SampleError:
        """The error of a sample that lacks a wanted field."""
        _, index, row = self._locator.entry(sample)
        names = [name for name, at in zip(self._manifest.fields, index.offset[row], strict=True) if at >= 0]
        lacking = " or ".join(repr(f) for f in self._fields[: self._needed] or self._fields if f not in names)
        return self.error(sample, f"it has no field {lacking}, only {', '.join(names) or 'nothing'}")
