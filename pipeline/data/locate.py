"""From numbers of samples to bytes of shards: where members lie, by the indexes, and which bytes are read together.

Shape letters: R samples, F wanted fields, P spans.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.core.manifest import Manifest, Shard, ShardIndex, load_index
from pipeline.data.headers import BLOCK
from pipeline.data.order import Ints
from pipeline.data.storage import Ranges

_INDEXES = 256
"""Shards whose indexes are kept."""
_GAP = 8 * BLOCK
"""Bytes between samples that are read along rather than skipped."""
_NOWHERE = np.iinfo(np.int64).max

Bools = npt.NDArray[np.bool_]


class Located(NamedTuple):
    """Where the members of samples lie. Samples are in ascending order of their numbers."""

    row: Ints
    """int64[R], position among the numbers asked for."""
    id: Ints
    """int64[R]."""
    shard: Ints
    """int64[R], number of the shard."""
    offset: Ints
    """int64[R,F], byte offset of the member's data in the shard; -1 where the sample lacks the field."""
    size: Ints
    """int64[R,F], bytes of the member's data; -1 where the sample lacks the field."""
    crc32: Ints
    """int64[R,F]; -1 where the sample lacks the field, and where the index has none."""

    @property
    def is_there(self) -> Bools:
        """bool[R,F], whether the sample has the field."""
        return self.offset >= 0

    def take(self, chosen: Ints | slice) -> Located:
        """Some of the samples."""
        return Located(*(column[chosen] for column in self))

    def parts(self, budget: int) -> Iterator[Located]:
        """Cut into parts whose members take at most ``budget`` bytes together, but at least one sample each."""
        total = np.cumsum(self.size.clip(min=0).sum(1))
        full = np.searchsorted(total, np.arange(budget, total[-1] + budget, budget), "right")
        begin = 0
        for end in [*full.tolist(), len(self.id)]:
            end = max(end, begin + 1)
            if begin < len(self.id):
                yield self.take(slice(begin, end))
            begin = end


class Locator:
    """Looks up members in the indexes of shards.

    Args:
        manifest: the data set.
        fields: the wanted ones.
    """

    def __init__(self, manifest: Manifest, fields: Sequence[str]) -> None:
        self._manifest = manifest
        self._starts = np.array(manifest.starts, np.int64)
        names = list(manifest.fields)
        self._columns = [names.index(name) for name in fields]
        self._kept: OrderedDict[int, tuple[Ints, Ints, Ints]] = OrderedDict()

    def locate(self, ids: Ints) -> Located:
        """Where the members of samples lie.

        Raises:
            DataError: the index of a shard is missing or damaged.
        """
        row = np.argsort(ids, kind="stable")
        ids = ids[row]
        shard = self.shards(ids)
        offset, size, crc32 = (np.empty((len(ids), len(self._columns)), np.int64) for _ in range(3))
        for begin, end in pairwise([*_first(_changes(shard)).tolist(), len(ids)]):
            number = int(shard[begin])
            own = ids[begin:end] - self._starts[number]
            for target, column in zip((offset, size, crc32), self._index(number), strict=True):
                target[begin:end] = column[own]
        return Located(row, ids, shard, offset, size, crc32)

    def shards(self, ids: Ints) -> Ints:
        """The numbers of the shards that samples lie in."""
        return np.searchsorted(self._starts, ids, "right") - 1

    def entry(self, sample: int) -> tuple[Shard, ShardIndex, int]:
        """A sample's shard, the shard's index, and the sample's row in it."""
        number = int(np.searchsorted(self._starts, sample, "right")) - 1
        shard = self._manifest.shards[number]
        return shard, load_index(self._manifest, shard), sample - int(self._starts[number])

    def _index(self, shard: int) -> tuple[Ints, Ints, Ints]:
        """Offset, size and CRC-32 of the wanted members of a shard's samples; the least recently used are dropped."""
        if shard not in self._kept:
            index = load_index(self._manifest, self._manifest.shards[shard])
            crc32 = np.full_like(index.size, -1) if index.crc32 is None else index.crc32
            # Contiguous copies, so that the columns of unwanted fields are not kept.
            self._kept[shard] = (
                np.ascontiguousarray(index.offset[:, self._columns]),
                np.ascontiguousarray(index.size[:, self._columns]),
                np.ascontiguousarray(crc32[:, self._columns]),
            )
            if len(self._kept) > _INDEXES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        return self._kept[shard]


class Layout(NamedTuple):
    """How samples are read into memory."""

    ranges: list[Ranges]
    """Bytes that are read with one call each; they come to lie one after the other."""
    rows: list[slice]
    """Which samples lie in each of them."""
    shift: Ints
    """int64[R], what leads from a byte's offset in the shard to its offset in memory."""


def lay_out(located: Located, shards: Sequence[Shard], piece: int) -> Layout:
    """Decide which bytes are read for some samples, each of which has at least one member.

    A sample extends from the header of its first member to the end of its last one. Samples that lie near each other
    in a shard are read as one span, with the gaps between them.

    Args:
        located: the samples.
        shards: of the data set.
        piece: about the number of bytes to read with one call.
    """
    begin = np.where(located.is_there, located.offset, _NOWHERE).min(1) - BLOCK
    end = (located.offset + located.size).max(1)
    new_range = _changes(located.shard) | _changes(np.cumsum(end - begin) // piece)
    new_span = new_range | (begin[1:] - end[:-1] > _GAP) | (begin[1:] < end[:-1])
    first = _first(new_span)
    start, stop = begin[first], np.maximum.reduceat(end, first)
    shift = np.cumsum(stop - start) - stop
    # Each range begins with a span.
    rows = [*_first(new_range).tolist(), len(located.id)]
    spans = np.searchsorted(first, rows).tolist()
    ranges = [
        Ranges(shards[int(located.shard[row])], start[low:high].tolist(), stop[low:high].tolist())
        for row, (low, high) in zip(rows, pairwise(spans), strict=False)
    ]
    span_of: Ints = np.concatenate([[0], np.cumsum(new_span)])
    return Layout(ranges, [slice(*ends) for ends in pairwise(rows)], shift[span_of])


def _changes(numbers: Ints) -> Bools:
    """bool[N-1], whether each of N numbers differs from the one before; the first has none."""
    return numbers[1:] != numbers[:-1]


def _first(is_new: Bools) -> Ints:
    """The rows at which something begins: row 0, and each that ``is_new``, bool[N-1], says of the next one."""
    return np.concatenate([[0], np.flatnonzero(is_new) + 1])
