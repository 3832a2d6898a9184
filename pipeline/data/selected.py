"""Reading samples of a selection: those that are kept, each with its members in sidecars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.data import Cache
from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest
from pipeline.data.access import open_storage
from pipeline.data.jsons import read_table, value_at
from pipeline.data.labels import decode_label
from pipeline.data.order import Ints
from pipeline.data.reader import Members, Read, Reader, SampleError
from pipeline.data.selection import Selection, Side

_TOGETHER = 4096
"""Samples whose tables are asked for at a time."""
_BUDGET = 64 * 10**6
LABEL = "label"


def open_reader(
    manifest: Manifest, needed: Sequence[str], optional: Sequence[str], cache: Cache | None, budget: int
) -> Reader | SelectedReader:
    """What reads a data set.

    Args:
        manifest: the data set.
        needed: fields that each sample must have.
        optional: fields that are read where a sample has them.
        cache: see :class:`pipeline.config.data.Cache`.
        budget: bytes of samples that are held at a time.
    """
    if isinstance(manifest, Selection):
        return SelectedReader(manifest, needed, optional, cache, budget)
    return Reader(manifest, needed, optional, open_storage(manifest, cache), budget)


class _SideReader:
    """A sidecar: which samples have something in it, and what."""

    def __init__(
        self, name: str, side: Side, needed: list[str], optional: list[str], cache: Cache | None, budget: int
    ) -> None:
        self.name, self.side = name, side
        storage = open_storage(side.manifest, cache)
        self.reader = Reader(side.manifest, needed, optional, storage, budget, may_be_bare=not needed)

    def expect(self, ids: Ints) -> None:
        rows = self.side.rows[ids]
        if (rows >= 0).any():
            self.reader.expect(rows[rows >= 0])

    def prefetch(self, ids: Ints) -> None:
        rows = self.side.rows[ids]
        self.reader.prefetch(rows[rows >= 0])

    def join(self, ids: Ints, reads: Iterator[Read]) -> Iterator[Read]:
        """Add the sidecar's members to what was read. Memory of both is used again for the next samples."""
        for read in reads:
            rows = self.side.rows[ids[read.rows]]
            is_bad = np.array([isinstance(found, SampleError) for found in read.found], bool)
            alone = np.flatnonzero(is_bad | (rows < 0))
            if len(alone):
                yield Read(read.rows[alone], [read.found[i] for i in alone.tolist()])
            there = np.flatnonzero(~is_bad & (rows >= 0))
            for part in self.reader.read(rows[there]) if len(there) else ():
                own = there[part.rows]
                pairs = zip(own.tolist(), part.found, strict=True)
                yield Read(read.rows[own], [self._merged(read.found[i], more) for i, more in pairs])

    def _merged(self, found: Members | SampleError, more: Members | SampleError) -> Members | SampleError:
        if isinstance(found, SampleError) or isinstance(more, SampleError):
            return found if isinstance(found, SampleError) else more
        return found | {f"{self.name}:{member}": data for member, data in more.items()}


class SelectedReader:
    """Samples of a selection by number; see :class:`Reader`."""

    def __init__(
        self,
        selection: Selection,
        needed: Sequence[str],
        optional: Sequence[str],
        cache: Cache | None,
        budget: int,
    ) -> None:
        self._kept = selection.kept
        self._needed = list(needed)
        own, more = ([m for m in members if m in selection.whole.fields] for members in (needed, optional))
        budget //= 1 + len(selection.sides)
        self._has_own = bool(own or more)
        storage = open_storage(selection.whole, cache)
        self._main = Reader(selection.whole, own, more, storage, budget, may_be_bare=not own)
        self._sides: list[_SideReader] = []
        for name, side in selection.sides.items():
            prefix = f"{name}:"
            own, more = ([m.removeprefix(prefix) for m in ms if m.startswith(prefix)] for ms in (needed, optional))
            if own or more:
                self._sides.append(_SideReader(name, side, own, more, cache, budget))

    def read(self, ids: Ints) -> Iterator[Read]:
        """See :meth:`Reader.read`."""
        for read in self.members(ids):
            found = [self._checked(number, f) for number, f in zip(ids[read.rows].tolist(), read.found, strict=True)]
            yield Read(read.rows, found)

    def members(self, ids: Ints) -> Iterator[Read]:
        """What there is of the samples, be it nothing."""
        if self._has_own:
            reads = self._main.read(self._kept[ids])
        else:
            reads = iter([Read(np.arange(len(ids)), [{} for _ in ids])])
        for side in self._sides:
            reads = side.join(ids, reads)
        return reads

    def _checked(self, sample: int, found: Members | SampleError) -> Members | SampleError:
        """What was found, or an error where a sample has nothing of a needed member in a sidecar."""
        if isinstance(found, SampleError):
            return found
        lacking = next((member for member in self._needed if member not in found), None)
        if lacking is None and found:
            return found
        return self.error(sample, f"it has no {lacking or 'member'!r}: a sidecar does not know its key")

    def expect(self, ids: Ints) -> None:
        """See :meth:`Reader.expect`."""
        if self._has_own:
            self._main.expect(self._kept[ids])
        for side in self._sides:
            side.expect(ids)

    def prefetch(self, ids: Ints) -> None:
        """See :meth:`Reader.prefetch`."""
        if self._has_own:
            self._main.prefetch(self._kept[ids])
        for side in self._sides:
            side.prefetch(ids)

    def error(self, sample: int, reason: str) -> SampleError:
        """See :meth:`Reader.error`."""
        return self._main.error(int(self._kept[sample]), reason)

    def close(self) -> None:
        """See :meth:`Reader.close`."""
        self._main.close()
        for side in self._sides:
            side.reader.close()


def look(
    selection: Selection, columns: Mapping[str, str], keeps: Callable[[Mapping[str, Any]], bool | str]
) -> npt.NDArray[np.bool_]:
    """bool[N], for which samples a condition on their metadata holds.

    Args:
        selection: the samples.
        columns: what the condition looks at, "NAME:score" or "score", and the member that it is looked up in.
        keeps: whether it holds for such values (None for what a sample lacks), or why that cannot be said.

    Raises:
        DataError: a member is damaged, or no table; it cannot be said whether the condition holds.
    """
    holds = np.zeros(selection.samples, np.bool_)
    names = {column: column.rpartition(":")[2] for column in columns}
    with closing(SelectedReader(selection, (), sorted(set(columns.values())), None, _BUDGET)) as reader:
        for number, found in _all(reader, selection.samples):
            try:
                of = {member: read_table(data) for member, data in found.items()}
            except ValueError as error:
                raise reader.error(number, f"its metadata cannot be read: {error}") from error
            kept = keeps({c: value_at(of.get(columns[c], {}), name, None) for c, name in names.items()})
            if isinstance(kept, str):
                raise reader.error(number, kept)
            holds[number] = kept
    return holds


def labels(selection: Selection) -> Ints:
    """int64[N], the class numbers of all samples.

    Raises:
        DataError: a sample has no label, or none of the data set's classes.
    """
    found = np.zeros(selection.samples, np.int64)
    if LABEL not in selection.fields:
        raise DataError(f"{selection.root} has no labels, only {', '.join(selection.fields) or 'nothing'}")
    with closing(SelectedReader(selection, (LABEL,), (), None, _BUDGET)) as reader:
        for number, members in _all(reader, selection.samples):
            try:
                found[number] = decode_label(members[LABEL], len(selection.classes))
            except (KeyError, ValueError) as error:
                raise reader.error(number, "it has no label" if isinstance(error, KeyError) else str(error)) from error
    return found


def _all(reader: SelectedReader, samples: int) -> Iterator[tuple[int, Members]]:
    """Every sample's number and what there is of it, be it nothing."""
    for first in range(0, samples, _TOGETHER):
        ids = np.arange(first, min(first + _TOGETHER, samples))
        for read in reader.members(ids):
            for number, found in zip(ids[read.rows].tolist(), read.found, strict=True):
                if isinstance(found, SampleError):
                    raise found
                yield number, found
