"""From numbers of samples to a micro-batch: reads, decodes, and replaces samples that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pipeline.config.schema import Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Manifest
from pipeline.core.registry import suggest
from pipeline.data.decode import ImageDecoder, decode_label
from pipeline.data.order import Order, Place
from pipeline.data.reader import Reader, SampleError

Arrays = dict[str, np.ndarray]

_FIELDS = ("image", "label")
_SUBSTITUTES = 32


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


class Plan(Protocol):
    """Which samples a rank's micro-batches hold."""

    @property
    def count(self) -> int | None:
        """Number of micro-batches; None: endless."""
        ...

    @property
    def size(self) -> int:
        """Samples of a micro-batch; the last may be smaller."""
        ...

    def place(self, number: int) -> Place:
        """The samples of a micro-batch."""
        ...

    def step(self, number: int) -> int:
        """The global step that a micro-batch belongs to."""
        ...

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """The sample that replaces sample ``index`` of a micro-batch, at attempt 1, 2, ...; None: there is none."""
        ...


@dataclass(frozen=True)
class TrainPlan:
    """A rank's part of every global batch, in micro-batches: number = step * accumulation + place in the step."""

    order: Order
    size: int
    rank: int
    world: int
    count: None = None

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.order.global_batch // (self.world * self.size)

    def step(self, number: int) -> int:
        """The global step that a micro-batch belongs to."""
        return number // self.accumulation

    def _first(self, number: int) -> int:
        return (self.rank * self.accumulation + number % self.accumulation) * self.size

    def place(self, number: int) -> Place:
        """The samples of a micro-batch."""
        first = self._first(number)
        return self.order.batch(self.step(number), first, first + self.size)

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """Another sample of the same window of the same lane."""
        return self.order.substitute(self.step(number), self._first(number) + index, attempt)


@dataclass(frozen=True)
class EvalPlan:
    """Samples ``first`` to ``last`` (exclusive) in order, each once, none replaced."""

    first: int
    last: int
    size: int

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        return -(-(self.last - self.first) // self.size)

    def step(self, number: int) -> int:
        """Evaluation has no steps; micro-batches count."""
        return number

    def place(self, number: int) -> Place:
        """The samples of a micro-batch."""
        begin = self.first + number * self.size
        ids = np.arange(begin, min(begin + self.size, self.last))
        return Place(np.zeros_like(ids), ids)

    def substitute(self, number: int, index: int, attempt: int) -> None:
        """None: a score over other samples than the promised ones is no score."""
        return None


def check_fields(manifest: Manifest, fields: Sequence[str]) -> None:
    """Raise ConfigError for a field that this program cannot decode or the data set does not have."""
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(f"data.fields: unknown field {name!r}; {suggest(name, list(_FIELDS))}")
        if name not in manifest.fields:
            raise ConfigError(
                f"data.fields: {manifest.root} has no field {name!r}, only {', '.join(manifest.fields) or 'none'}"
            )


class Assembler:
    """Fills arrays with micro-batches. The same in a loader process and in the rank itself.

    Args:
        manifest: the data set.
        fields: fields of a batch.
        image: geometry of images.
        seed: seed of the run.
        plan: which samples.
    """

    def __init__(self, manifest: Manifest, fields: Sequence[str], image: Image, seed: int, plan: Plan) -> None:
        check_fields(manifest, fields)
        self.plan = plan
        self._fields = tuple(fields)
        self._classes = len(manifest.classes)
        self._images = ImageDecoder(image, seed)
        self._reader = Reader(manifest, fields)
        self.columns = {"id": Column("int64", ()), "epoch": Column("int64", ())}
        if "image" in fields:
            self.columns |= {name: Column("uint8", (3, *image.shape)) for name in self._images.names}
        if "label" in fields:
            self.columns["label"] = Column("int64", ())

    def fill(self, number: int, arrays: Arrays) -> tuple[int, list[Bad]]:
        """Write micro-batch ``number`` into arrays of [B, *column.shape].

        Returns:
            The number of samples, and the ledger's lines.

        Raises:
            DataError: a shard is damaged, or a sample is and nothing can stand in for it.
        """
        epochs, ids = self.plan.place(number)
        geometry = self._images.geometry(torch.from_numpy(epochs), torch.from_numpy(ids))
        bad = []
        arrays["epoch"][: len(ids)] = epochs
        for row, sample in enumerate(ids.tolist()):
            try:
                self._write(row, sample, geometry[row], arrays)
            except SampleError as error:
                bad.append(self._replace(number, row, int(epochs[row]), sample, error, arrays))
        return len(ids), bad

    def close(self) -> None:
        """Release files."""
        self._reader.close()

    def _write(self, row: int, sample: int, geometry: list[Any], arrays: Arrays) -> None:
        members = self._reader.read(sample)
        name = ""
        try:
            for name in self._fields:
                if name == "label":
                    arrays["label"][row] = decode_label(members[name], self._classes)
                else:
                    views = self._images.decode(members[name], geometry)
                    for key, view in zip(self._images.names, views, strict=True):
                        torch.from_numpy(arrays[key][row]).copy_(view)
        except ValueError as error:
            raise self._reader.error(sample, f"field {name!r}: {error}") from error
        arrays["id"][row] = sample

    def _replace(self, number: int, row: int, epoch: int, sample: int, error: SampleError, arrays: Arrays) -> Bad:
        """Put the next readable sample of the window in place of one that cannot be used."""
        for attempt in range(1, _SUBSTITUTES + 1):
            other = self.plan.substitute(number, row, attempt)
            if other is None:
                break
            one = self._images.geometry(torch.tensor([epoch]), torch.tensor([other]))
            try:
                self._write(row, other, one[0], arrays)
            except SampleError:
                continue
            return Bad(self.plan.step(number), epoch, sample, error.shard, error.key, error.reason, other)
        if attempt == 1:
            raise error
        raise DataError(f"{error}; none of the {attempt} samples after it can be used either") from error
