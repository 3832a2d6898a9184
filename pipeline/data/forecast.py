"""What a run of a given shape would read, before it is run. Computed from the order alone; no torch, no shards read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.core.manifest import Manifest
from pipeline.data.order import Ints, Order

_STEPS = 16
"""Steps of the epoch that are looked at, spread over it."""


@dataclass(frozen=True)
class Forecast:
    """A run's reading. A shard counts as open while the window that it lies in is being read."""

    lanes: int
    steps_per_epoch: float
    left_over: int
    """Samples of an epoch that are dropped at its end."""
    batches_per_rank: int
    """Micro-batches that each rank reads in an epoch; the same number for all."""
    shards_per_node: tuple[int, int]
    """Fewest and most shards that a node touches in an epoch."""
    open_per_rank: int
    """Most shards open at a time."""
    open_per_node: int
    shards_in_batch: float
    """Different shards in a micro-batch, on average."""
    gigabytes_per_node: float
    """Most gigabytes of shards that a node touches in an epoch: what a cache would need to hold all."""
    bytes_per_sample: float


def covered(first: Ints, last: Ints, parts: int) -> Ints:
    """How many slots of the line the lanes of each part cover together.

    Args:
        first: int64[L], ascending: first slot of the line that a lane needs.
        last: int64[L], ascending: the one after its last.
        parts: ranks or nodes. Each takes a run of lanes; where there are more parts than lanes, they share lanes.
    """
    lanes = len(first)
    low = np.arange(parts) * lanes // parts
    high = -(-(np.arange(parts) + 1) * lanes // parts)
    before = np.concatenate([[0], last[:-1]])
    own = np.cumsum(np.concatenate([[0], last - np.maximum(first, np.minimum(before, last))]))
    # The first lane of a part shares slots with the lane before it only in the other part's count.
    shared = np.maximum(0, before[low] - first[low])
    return own[high] - own[low] + shared


def forecast(manifest: Manifest, order: Order, *, nodes: int, world: int, micro_batch: int) -> Forecast:
    """What the ranks of a run would read in its first epoch.

    Args:
        manifest: the data set.
        order: its order.
        nodes: of the run; each has world / nodes ranks.
        world: number of ranks.
        micro_batch: samples per rank and forward.
    """
    steps = order.samples // order.global_batch
    looked_at = np.unique(np.linspace(0, steps - 1, _STEPS).astype(np.int64)).tolist()
    windows = [order.windows(step) for step in looked_at]
    first, last = order.slots(0)
    touched = covered(first, last, nodes)
    per_rank = order.global_batch // world
    kinds = []
    for step in looked_at:
        rank = step % world
        ids = order.batch(step, rank * per_rank, rank * per_rank + micro_batch).id
        kinds.append(len(np.unique(np.searchsorted(order.starts, ids, "right"))))
    total = sum(s.bytes for s in manifest.shards)
    return Forecast(
        lanes=order.lanes,
        steps_per_epoch=order.steps_per_epoch,
        left_over=order.samples - steps * order.global_batch if order.tail == "drop" else 0,
        batches_per_rank=steps * (per_rank // micro_batch),
        shards_per_node=(int(touched.min()), int(touched.max())),
        open_per_rank=max(int(covered(*w, world).max()) for w in windows),
        open_per_node=max(int(covered(*w, nodes).max()) for w in windows),
        shards_in_batch=float(np.mean(kinds)),
        gigabytes_per_node=float(touched.max()) * total / max(len(manifest.shards), 1) / 1e9,
        bytes_per_sample=total / order.samples,
    )
