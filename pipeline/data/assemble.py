"""From numbers of samples to a micro-batch: reads, decodes, and replaces samples that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pipeline.config.schema import Data
from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest
from pipeline.data.chance import chance_of
from pipeline.data.field import Arrays, Column, Sample, Unusable, make_fields
from pipeline.data.order import Ints
from pipeline.data.reader import Members, Reader, SampleError
from pipeline.data.reading import ReadingPlan
from pipeline.data.selected import SelectedReader, open_reader
from pipeline.data.selection import sources
from pipeline.data.text import read_tokenizer

_SUBSTITUTES = 32
_AHEAD = 64
"""Micro-batches ahead of which shards are asked for."""


@dataclass(frozen=True)
class Bad:
    """A line of the ledger: a sample that could not be used and what stands in for it."""

    step: int
    epoch: int
    id: int
    shard: str
    key: str
    reason: str
    substitute: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Filled(NamedTuple):
    """What filling a micro-batch has come to."""

    samples: int
    bad: list[Bad]
    events: Counter[str]
    """How often something happened that is no mistake but worth knowing; see :attr:`Assembler.kinds`."""


class Filler(Protocol):
    """Writes micro-batches into arrays; runs in loader processes or in the rank itself."""

    reading: ReadingPlan
    columns: dict[str, Column]

    def expect(self, number: int) -> None:
        """Micro-batch ``number`` will be filled after the next one: its bytes may be fetched meanwhile."""
        ...

    def fill(self, number: int, arrays: Arrays) -> Filled:
        """Write micro-batch ``number`` into arrays of [B, *column.shape]."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class Assembler:
    """Fills arrays with micro-batches. The same in a loader process and in the rank itself.

    Args:
        manifest: the data set.
        data: fields, geometry, captions, cache and budget.
        seed: seed of the run.
        reading: which samples.
        tokenizer: of texts, as its file; None: the data set's, or the one that ``data.captions`` names.

    Raises:
        ConfigError: see :func:`make_fields`.
    """

    def __init__(
        self, manifest: Manifest, data: Data, seed: int, reading: ReadingPlan, tokenizer: bytes | None = None
    ) -> None:
        self.reading = reading
        self.samples = manifest.samples
        self.chance = chance_of(data, manifest, seed)
        self._fields = make_fields(
            manifest, data, self.chance.seed, lambda: tokenizer or read_tokenizer(manifest, data.captions)
        )
        fields = self._fields.values()
        self.kinds = tuple(dict.fromkeys(kind for field in fields for kind in field.kinds))
        self.text = next((field.text for field in fields if field.text), None)
        self.columns = {"id": Column("int64", ()), "epoch": Column("int64", ())}
        for field in fields:
            self.columns |= field.columns
        needed = list(dict.fromkeys(member for field in fields for member in field.needs))
        optional = list(dict.fromkeys(m for field in fields for m in field.takes if m not in needed))
        parts = sources(manifest)
        budget = data.read_mb * 10**6 // len(parts)
        self._cached = data.cache is not None
        self._readers = [open_reader(p, needed, optional, data.cache, budget) for p in parts]
        self._bases = np.cumsum([0, *(p.samples for p in parts)])

    def expect(self, number: int) -> None:
        """See :class:`Filler`. What is wrong with those samples is said when it is their turn."""
        for reader, ids in self._shares(self.reading.draw(number).id):
            with suppress(DataError):
                reader.expect(ids)

    def fill(self, number: int, arrays: Arrays) -> Filled:
        """See :class:`Filler`.

        Raises:
            DataError: a shard is damaged, or a sample is and nothing can stand in for it.
        """
        self._prefetch(number + _AHEAD)
        epochs, ids = self.reading.draw(number)
        drawn = self._draw(epochs, ids)
        failed = {}
        arrays["epoch"][: len(ids)] = epochs
        for row, found in self._read(ids):
            problem = (
                found if isinstance(found, SampleError) else self._decode(row, ids[row], found, drawn[row], arrays)
            )
            if isinstance(problem, SampleError):
                failed[row] = problem
        # In the order of the batch, so that the ledger does not depend on the order of reading.
        bad = [self._replace(number, row, int(epochs[row]), failed[row], arrays) for row in sorted(failed)]
        return Filled(len(ids), bad, self._events())

    def close(self) -> None:
        """Release files."""
        for reader in self._readers:
            reader.close()

    def _draw(self, epochs: Ints, ids: Ints) -> list[tuple[Any, ...]]:
        """What chance decides: for each sample, for each field."""
        epoch, sample = self.chance.of(torch.from_numpy(epochs), torch.from_numpy(ids))
        return list(zip(*(field.draw(epoch, sample) for field in self._fields.values()), strict=True))

    def _events(self) -> Counter[str]:
        """What happened in all fields since the last call."""
        events: Counter[str] = Counter()
        for field in self._fields.values():
            events.update(field.events)
            field.events.clear()
        return events

    def _read(self, ids: Ints) -> Iterator[tuple[int, Members | SampleError]]:
        """The members of samples, in any order, with their rows."""
        part = np.searchsorted(self._bases, ids, "right") - 1
        for i in np.unique(part).tolist():
            rows = np.flatnonzero(part == i)
            for read in self._readers[i].read(ids[rows] - self._bases[i]):
                yield from zip(rows[read.rows].tolist(), read.found, strict=True)

    def _prefetch(self, number: int) -> None:
        if self._cached:
            for reader, ids in self._shares(self.reading.draw(number).id):
                reader.prefetch(ids)

    def _shares(self, ids: Ints) -> Iterator[tuple[Reader | SelectedReader, Ints]]:
        """The readers that have some of these samples, and their own numbers for them."""
        for reader, first, last in zip(self._readers, self._bases[:-1], self._bases[1:], strict=True):
            own = ids[(ids >= first) & (ids < last)] - first
            if len(own):
                yield reader, own

    def _decode(
        self, row: int, number: int, members: Members, drawn: tuple[Any, ...], arrays: Arrays
    ) -> SampleError | None:
        """Write one sample into its row, or say what is wrong with it."""
        sample, name = Sample(members), ""
        try:
            for name, own in zip(self._fields, drawn, strict=True):
                self._fields[name].decode(sample, own, arrays, row)
        except ValueError as error:
            member = error.member if isinstance(error, Unusable) else name
            part = int(np.searchsorted(self._bases, number, "right")) - 1
            return self._readers[part].error(int(number - self._bases[part]), f"field {member!r}: {error}")
        arrays["id"][row] = number
        return None

    def _replace(self, number: int, row: int, epoch: int, error: SampleError, arrays: Arrays) -> Bad:
        """Put the next readable sample of the window in place of one that cannot be used."""
        planned, tried = int(self.reading.draw(number).id[row]), 0
        while tried < _SUBSTITUTES:
            other = self.reading.substitute(number, row, tried + 1)
            if other is None:
                break
            tried += 1
            one = np.array([other])
            ((_, found),) = self._read(one)
            (drawn,) = self._draw(np.array([epoch]), one)
            if not isinstance(found, SampleError) and not self._decode(row, other, found, drawn, arrays):
                return Bad(self.reading.step(number), epoch, planned, error.shard, error.key, error.reason, other)
        if not tried:
            raise error
        raise DataError(f"{error}; none of the {tried} samples after it can be used either") from error
