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
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Joined, Manifest
from pipeline.core.registry import suggest
from pipeline.data.access import open_storage
from pipeline.data.decode import Geometry, ImageDecoder, decode_label
from pipeline.data.device import MAX_BYTES, check_jpeg
from pipeline.data.order import Ints
from pipeline.data.reader import Members, Reader, SampleError
from pipeline.data.reading import ReadingPlan
from pipeline.data.text import EmptyText, TextDecoder, read_tokenizer

Arrays = dict[str, np.ndarray]

_FIELDS = ("image", "label", "text")
_SUBSTITUTES = 32
_AHEAD = 64
"""Micro-batches ahead of which shards are asked for."""


class Column(NamedTuple):
    """One entry of a batch, without the batch dimension."""

    dtype: str
    shape: tuple[int, ...]


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


class _Numbers(NamedTuple):
    """Random numbers of one sample."""

    views: list[Geometry]
    coin: float


def check_fields(manifest: Manifest, data: Data) -> None:
    """Raise ConfigError for a field that this program cannot decode or the data set does not have."""
    for name in data.fields:
        if name not in _FIELDS:
            raise ConfigError(f"data.fields: unknown field {name!r}; {suggest(name, list(_FIELDS))}")
        wanted = data.captions.fields if name == "text" else (name,)
        for field in wanted:
            if field not in manifest.fields:
                where = "data.captions.fields" if name == "text" else "data.fields"
                raise ConfigError(
                    f"{where}: {manifest.root} has no field {field!r}, only {', '.join(manifest.fields) or 'none'}"
                )
    if "label" in data.fields and isinstance(manifest, Joined) and len({p.classes for p in manifest.parts}) > 1:
        raise ConfigError("data.fields: labels of sources with different classes cannot be mixed; remove 'label'")


class Assembler:
    """Fills arrays with micro-batches. The same in a loader process and in the rank itself.

    Args:
        manifest: the data set.
        data: fields, geometry, captions, cache and budget.
        seed: seed of the run.
        reading: which samples.
        tokenizer: of texts, as its file; None: the data set's, or the one that ``data.captions`` names.

    Raises:
        ConfigError: see :func:`check_fields` and :class:`TextDecoder`.
    """

    def __init__(
        self, manifest: Manifest, data: Data, seed: int, reading: ReadingPlan, tokenizer: bytes | None = None
    ) -> None:
        check_fields(manifest, data)
        self.reading = reading
        self.samples = manifest.samples
        self.kinds = ("truncated_texts", "empty_texts") if "text" in data.fields else ()
        self._events: Counter[str] = Counter()
        self._fields = data.fields
        self._classes = len(manifest.classes)
        self._images = ImageDecoder(data.image, seed) if "image" in data.fields else None
        self._encoded = data.decode == "device"
        self.text = None
        parts = manifest.parts if isinstance(manifest, Joined) else (manifest,)
        needed = [f for f in data.fields if f != "text"]
        captions: list[str] = []
        self.columns = {"id": Column("int64", ()), "epoch": Column("int64", ())}
        if self._images and self._encoded:
            self.columns |= {"encoded": Column("uint8", (MAX_BYTES,)), "encoded_size": Column("int64", ())}
        elif self._images:
            self.columns |= {name: Column("uint8", (3, *data.image.shape)) for name in self._images.names}
        if "label" in data.fields:
            self.columns["label"] = Column("int64", ())
        if "text" in data.fields:
            self.text = TextDecoder(data.captions, tokenizer or read_tokenizer(manifest, data.captions), seed)
            captions = list(data.captions.fields)
            self.columns |= {"text": Column("int64", (data.captions.length,)), "text_length": Column("int64", ())}
        budget = data.read_mb * 10**6 // len(parts)
        self._cached = data.cache is not None
        self._readers = [Reader(p, needed, captions, open_storage(p, data.cache), budget) for p in parts]
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
        self._events = Counter()
        epochs, ids = self.reading.draw(number)
        numbers = self._numbers(epochs, ids)
        failed = {}
        arrays["epoch"][: len(ids)] = epochs
        for row, found in self._read(ids):
            problem = (
                found if isinstance(found, SampleError) else self._decode(row, ids[row], found, numbers[row], arrays)
            )
            if problem:
                failed[row] = problem
        # In the order of the batch, so that the ledger does not depend on the order of reading.
        bad = [self._replace(number, row, int(epochs[row]), failed[row], arrays) for row in sorted(failed)]
        return Filled(len(ids), bad, self._events)

    def close(self) -> None:
        """Release files."""
        for reader in self._readers:
            reader.close()

    def _numbers(self, epochs: Ints, ids: Ints) -> list[_Numbers]:
        epoch, sample = torch.from_numpy(epochs), torch.from_numpy(ids)
        here = None if self._encoded else self._images
        views = here.geometry(epoch, sample) if here else [[]] * len(ids)
        coins = self.text.coins(epoch, sample) if self.text else [0.0] * len(ids)
        return [_Numbers(v, c) for v, c in zip(views, coins, strict=True)]

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

    def _shares(self, ids: Ints) -> Iterator[tuple[Reader, Ints]]:
        """The readers that have some of these samples, and their own numbers for them."""
        for reader, first, last in zip(self._readers, self._bases[:-1], self._bases[1:], strict=True):
            own = ids[(ids >= first) & (ids < last)] - first
            if len(own):
                yield reader, own

    def _decode(self, row: int, sample: int, members: Members, numbers: _Numbers, arrays: Arrays) -> SampleError | None:
        """Write one sample into its row, or say what is wrong with it."""
        name = ""
        try:
            for name in self._fields:
                if name == "label":
                    arrays["label"][row] = decode_label(members[name], self._classes)
                elif name == "text":
                    assert self.text
                    name = self.text.choose(tuple(members), numbers.coin)
                    arrays["text"][row], arrays["text_length"][row], is_cut = self.text.decode(members[name])
                    self._events["truncated_texts"] += is_cut
                elif self._encoded:
                    file = check_jpeg(members[name])
                    arrays["encoded_size"][row] = len(file)
                    arrays["encoded"][row, : len(file)] = file
                else:
                    assert self._images
                    views = self._images.decode(members[name], numbers.views)
                    for key, view in zip(self._images.names, views, strict=True):
                        torch.from_numpy(arrays[key][row]).copy_(view)
        except ValueError as error:
            self._events["empty_texts"] += isinstance(error, EmptyText)
            part = int(np.searchsorted(self._bases, sample, "right")) - 1
            return self._readers[part].error(int(sample - self._bases[part]), f"field {name!r}: {error}")
        arrays["id"][row] = sample
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
            numbers = self._numbers(np.array([epoch]), one)[0]
            if not isinstance(found, SampleError) and not self._decode(row, other, found, numbers, arrays):
                return Bad(self.reading.step(number), epoch, planned, error.shard, error.key, error.reason, other)
        if not tried:
            raise error
        raise DataError(f"{error}; none of the {tried} samples after it can be used either") from error
