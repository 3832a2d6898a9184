"""Features of every sample of a stream, in the order of the manifest: one pass of the encoder, spread over the ranks.

Rows go to their places as they are made, in memory or in a file, so that nothing is held twice. Where they lie in
memory, each rank is sent those of the others; where they lie in a file that all ranks see, they all read that.
Shape letters: N samples of the stream, B of a batch, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import Precision
from pipeline.core.errors import DataError
from pipeline.core.evaluation import EvalStream, Reading
from pipeline.core.protocols import Batch
from pipeline.dist.collectives import rank_and_world
from pipeline.dist.gather import CHUNK_BYTES, gather_ragged
from pipeline.dist.group import by_all, gather_objects
from pipeline.nn.reading import read

DIGEST = "_digest"
"""Ends the name of a field of which only a digest is kept."""
Wanted: TypeAlias = Reading | str
"""A column of what is extracted: a reading of the encoder, or a field of the batches."""


class Form(NamedTuple):
    """What a row of a column is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of a row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def rows(self, raw: Tensor) -> Tensor:
        """uint8[N,bytes] as [N,*shape]; the same memory."""
        return raw.view(self.dtype).view(len(raw), *self.shape)


class Rows(Protocol):
    """Where the rows of a column go."""

    def put(self, ids: Tensor, raw: Tensor) -> None:
        """Take rows of this rank, uint8[B,bytes], of the samples ``ids``."""
        ...

    def whole(self, ids: Tensor) -> Tensor:
        """All ranks together, which have put ``ids`` each: uint8[N,bytes], the same on every rank."""
        ...

    def discard(self) -> None:
        """Leave nothing behind, where the pass has failed."""
        ...


RowsOf: TypeAlias = Callable[[Wanted, Form], Rows]
"""Makes the rows of a column; all ranks together, for the same columns in the same order."""


class InMemory:
    """Rows in main memory; other ranks' are fetched at the end.

    Args:
        samples: N.
        form: of a row.
    """

    def __init__(self, samples: int, form: Form) -> None:
        self._rows = torch.empty(samples, form.bytes, dtype=torch.uint8)

    def put(self, ids: Tensor, raw: Tensor) -> None:
        """See :class:`Rows`."""
        self._rows[ids] = raw

    def whole(self, ids: Tensor) -> Tensor:
        """See :class:`Rows`."""
        _, world = rank_and_world()
        if world > 1:
            step = max(1, CHUNK_BYTES // max(1, self._rows.shape[1]))
            for first in range(0, max(gather_objects(len(ids))), step):
                mine = ids[first : first + step]
                self._rows[gather_ragged(mine)] = gather_ragged(self._rows[mine])
        return self._rows

    def discard(self) -> None:
        """See :class:`Rows`."""


def extract(
    encoder: nn.Module | None,
    stream: EvalStream,
    readings: Sequence[Reading],
    fields: Sequence[str],
    precision: Precision = "fp32",
    places: RowsOf | None = None,
) -> dict[Wanted, Tensor]:
    """Walk a stream once. All ranks call this together; each encodes its own share.

    Args:
        encoder: maps "image", uint8[B,C,H,W], to float[B,D]; None: no reading is wanted.
        stream: of images.
        readings: what to keep of every image.
        fields: what else to keep of a sample: columns of the batches, "NAME_digest" int64[N,2], equal for equal ones.
        precision: "bf16": autocast, as in training, so that norms and the weights themselves stay in fp32; the
            features are kept in bf16, too.
        places: where the rows go; None: into memory.

    Returns:
        [N,...] of each: readings in float32 or bfloat16 as ``precision`` says, fields as they are.

    Raises:
        ConfigError: the encoder has no such blocks or tokens.
        DataError: a field is not there, or the ranks' shares do not make up the stream exactly.
    """
    wanted: list[Wanted] = [*readings, *fields]
    device = next(encoder.parameters()).device if encoder is not None else torch.device("cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def compute(batch: Batch) -> list[Tensor]:
        if encoder is None:
            return []
        image = batch["image"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = read(encoder, image, readings)
        return [found[reading].to(dtype) for reading in readings]

    def columns() -> Iterator[tuple[Tensor, list[Tensor]]]:
        for batch, features in _one_late((batch, compute(batch)) for batch in stream):
            values = [x.cpu() for x in features] + [_field(batch, name) for name in fields]
            yield batch["id"].cpu(), values

    rest = columns()
    first = by_all(lambda: list(islice(rest, 1)))
    forms = _forms(first[0][1] if first else None)
    made = [(places or _in_memory(stream.samples))(*each) for each in zip(wanted, forms, strict=True)]
    try:
        ids = by_all(lambda: _put(chain(first, rest), stream.samples, forms, made))
        _check_ids(ids, stream.samples)
        return {name: form.rows(rows.whole(ids)) for name, form, rows in zip(wanted, forms, made, strict=True)}
    except BaseException:
        for rows in made:
            rows.discard()
        raise


def _in_memory(samples: int) -> RowsOf:
    return lambda _, form: InMemory(samples, form)


def _one_late(batches: Iterable[Any]) -> Iterator[Any]:
    """The same, each when the next one is under way: an accelerator computes while the host takes what came before."""
    late: list[Any] = []
    for batch in batches:
        yield from late
        late = [batch]
    yield from late


def _forms(values: Sequence[Tensor] | None) -> list[Form]:
    """Of all columns. A rank without a sample, because there are more ranks than batches, learns them from others."""
    own = [Form(value.dtype, tuple(value.shape[1:])) for value in values] if values is not None else None
    return next(known for known in gather_objects(own) if known is not None)


def _put(
    found: Iterable[tuple[Tensor, list[Tensor]]], samples: int, forms: Sequence[Form], places: Sequence[Rows]
) -> Tensor:
    """Put all rows where they belong: returns their numbers, int64[n].

    Raises:
        DataError: a row is of no sample of the stream.
    """
    seen = [torch.empty(0, dtype=torch.int64)]
    for ids, values in found:
        if len(ids) == 0:
            continue
        if not 0 <= int(ids.min()) <= int(ids.max()) < samples:
            raise DataError(f"a batch holds sample {int(ids.max())}, and the stream has {samples}")
        for value, form, place in zip(values, forms, places, strict=True):
            # A copy even of what counts as contiguous: a single row does at any stride, and is no bytes then.
            rows = value.clone(memory_format=torch.contiguous_format)
            place.put(ids, rows.view(len(ids), -1).view(torch.uint8).view(len(ids), form.bytes))
        seen.append(ids)
    return torch.cat(seen)


def _check_ids(own: Tensor, samples: int) -> None:
    ids = gather_ragged(own)
    if not torch.equal(ids.sort().values, torch.arange(samples)):
        raise DataError(f"the ranks' shares hold {len(ids)} samples, not each of {samples} once")


def _field(batch: Batch, name: str) -> Tensor:
    """A field of a batch, or the digest of one."""
    field = name.removesuffix(DIGEST)
    if field not in batch:
        kind = {"label": "labels", "text": "texts", "text_length": "texts"}.get(field, f"the field {field!r}")
        raise DataError(
            f"this evaluation needs {kind}, but the stream's batches have none; "
            f'add "{field.removesuffix("_length")}" to the suite\'s fields, or rebuild the shards with it'
        )
    value = batch[field].cpu()
    if not name.endswith(DIGEST):
        return value
    rows = [hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=16).digest() for row in value]
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.int64).reshape(-1, 2).copy())


def check_labels(label: Tensor, classes: Sequence[str]) -> None:
    """Hold labels against the names of classes.

    Raises:
        DataError: a label has no name.
    """
    if label.min() < 0 or label.max() >= len(classes):
        raise DataError(
            f"labels run from {int(label.min())} to {int(label.max())}, but the manifest names "
            f"{len(classes)} classes; rebuild the shards or mend the manifest's classes"
        )
