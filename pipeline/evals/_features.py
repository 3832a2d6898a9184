"""Features of every sample of a stream, on every rank, in the order of the manifest: what probes are fed with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import DataError
from pipeline.core.evaluation import OWN, EvalStream, Features, Reading
from pipeline.core.protocols import Batch
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import gather_objects
from pipeline.nn.reading import read

DIGEST = "_digest"
"""Ends the name of a field of which only a digest is kept."""


def extract(
    encoder: nn.Module, stream: EvalStream, fields: Sequence[str], readings: Sequence[Reading] = (OWN,)
) -> dict[Reading, Features]:
    """Run the encoder over a stream. All ranks call this together; each encodes its own share.

    Args:
        encoder: maps "image", uint8[B,C,H,W], to float[B,D].
        stream: of images.
        fields: see :meth:`pipeline.core.evaluation.EvalContext.features`.
        readings: what to keep of every image.

    Raises:
        ConfigError: the encoder has no such blocks or tokens.
        DataError: a field is not there, or the ranks' shares do not make up the stream exactly.
    """
    device = next(encoder.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    for batch in stream:
        read_off = read(encoder, batch["image"].to(device, non_blocking=True), readings)
        kept = (_field(batch, name) for name in fields)
        parts.append((*(read_off[r].float().cpu() for r in readings), batch["id"].cpu(), *kept))
    # A rank that has no sample, because there are more ranks than samples, learns the shapes from the others.
    own = [(part.shape[1:], part.dtype) for part in parts[0]] if parts else None
    shapes = next(known for known in gather_objects(own) if known is not None)
    empty = tuple(torch.empty(0, *shape, dtype=dtype) for shape, dtype in shapes)
    columns = [gather_ragged(torch.cat(column)) for column in zip(empty, *parts, strict=True)]
    xs, ids, kept = columns[: len(readings)], columns[len(readings)], columns[len(readings) + 1 :]
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(stream.samples)):
        raise DataError(f"the ranks' shares hold {len(ids)} samples, not each of {stream.samples} once")
    values = {n: v[order] for n, v in zip(fields, kept, strict=True)}
    if "label" in fields:
        _check_labels(values["label"], stream.classes)
    return {r: Features(x[order], values, stream.classes) for r, x in zip(readings, xs, strict=True)}


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


def _check_labels(label: Tensor, classes: Sequence[str]) -> None:
    if label.min() < 0 or label.max() >= len(classes):
        raise DataError(
            f"labels run from {int(label.min())} to {int(label.max())}, but the manifest names "
            f"{len(classes)} classes; rebuild the shards or mend the manifest's classes"
        )
