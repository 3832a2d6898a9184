"""Features of every sample of a stream, on every rank, in the order of the manifest: what probes are fed with."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import EvalStream
from pipeline.core.registry import suggest
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import gather_rows


class Features(NamedTuple):
    """N samples, the same on every rank; kept in main memory."""

    x: Tensor
    """float32[N,D]."""
    label: Tensor
    """int64[N]."""
    classes: int


T = TypeVar("T")

_remembered: ContextVar[dict[Hashable, Any] | None] = ContextVar("remembered", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, what several evaluations need is made once, features and samples: models must not change meanwhile."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def remembered(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives, or gave before under the same ``key``."""
    known = _remembered.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]


def named_stream(streams: Mapping[str, EvalStream], name: str, setting: str) -> EvalStream:
    """The stream that a setting of an evaluation names.

    Raises:
        ConfigError: the suite has no stream of that name.
    """
    if name not in streams:
        raise ConfigError(f"{setting} = {name!r}: the suite has no such stream; {suggest(name, sorted(streams))}")
    return streams[name]


def extract(encoder: nn.Module, stream: EvalStream) -> Features:
    """Run the encoder over a stream. All ranks call this together; each encodes its own share.

    Raises:
        DataError: no labels, or the ranks' shares do not make up the stream exactly.
    """
    return remembered((encoder, stream), lambda: _extract(encoder, stream))


def _extract(encoder: nn.Module, stream: EvalStream) -> Features:
    device = next(encoder.parameters()).device
    ids, x, label = [], [], []
    for batch in stream:
        if "label" not in batch:
            raise DataError("this evaluation needs labels, but the stream's batches have none; rebuild with labels")
        x.append(encoder(batch["image"].to(device, non_blocking=True)).float().cpu())
        ids.append(batch["id"].cpu())
        label.append(batch["label"].cpu())
    # A rank that has no sample, because there are more ranks than samples, learns the features' width from the others.
    width = int(gather_rows(torch.tensor([x[0].shape[1] if x else 0])).max())
    all_x = gather_ragged(torch.cat([torch.empty(0, width), *x]))
    all_ids, all_label = (gather_ragged(torch.cat([torch.empty(0, dtype=torch.int64), *rows])) for rows in (ids, label))
    order = all_ids.argsort()
    expected = torch.arange(stream.samples)
    if len(order) != stream.samples or not torch.equal(all_ids[order], expected):
        raise DataError(f"the ranks' shares hold {len(order)} samples, not each of {stream.samples} once")
    labels = all_label[order]
    if labels.min() < 0 or labels.max() >= len(stream.classes):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the manifest names "
            f"{len(stream.classes)} classes; rebuild the shards or mend the manifest's classes"
        )
    return Features(all_x[order], labels, len(stream.classes))
