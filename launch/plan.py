"""``sluice plan``: what a run of a given shape would read of a data set."""

from __future__ import annotations

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.core.manifest import load
from pipeline.data.forecast import forecast
from pipeline.data.order import Order, default_lanes


def plan(
    data: str,
    *,
    nodes: int,
    procs: int,
    global_batch: int,
    micro_batch: int | None,
    lanes: int | None,
    window: int,
    images_per_second: float,
) -> str:
    """The forecast as text.

    Args:
        data: folder or URL of the data set.
        nodes: of the run.
        procs: ranks per node.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward; None: no accumulation.
        lanes: None: chosen as a run does.
        window: shards shuffled together.
        images_per_second: that all ranks together are to take.

    Raises:
        ConfigError: the batch does not divide or exceeds the data.
        DataError: no manifest.
    """
    manifest, world = load(data), nodes * procs
    micro = micro_batch or global_batch // world
    if not micro or global_batch % (world * micro):
        raise ConfigError(f"a global batch of {global_batch} is not a multiple of {world} ranks x {micro or 1} samples")
    if global_batch > manifest.samples:
        raise ConfigError(f"a global batch of {global_batch} is more than the {manifest.samples} samples of {data}")
    chosen = lanes or default_lanes(global_batch, len(manifest.shards))
    if global_batch % chosen:
        raise ConfigError(f"{chosen} lanes do not divide a global batch of {global_batch}")
    order = Order(np.array(manifest.starts, np.int64), 0, global_batch, chosen, window, "drop")
    found = forecast(manifest, order, nodes=nodes, world=world, micro_batch=micro)
    ends = ", ".join(f"{found.steps_per_epoch * e:,.6g}" for e in (1, 2, 3))
    rate = images_per_second * found.bytes_per_sample / nodes / 1e6
    epoch = f"{found.steps_per_epoch:,.6g} steps, {found.left_over:,} samples left over"
    shards = len(manifest.shards)
    rows = {
        "data": f"{manifest.samples:,} samples in {shards:,} shards, {found.bytes_per_sample:,.0f} bytes each",
        "ranks": f"{world:,} = {nodes} nodes x {procs}",
        "global batch": f"{global_batch:,} = {world} ranks x {micro} samples x {global_batch // world // micro}",
        "lanes": f"{found.lanes:,}, {shards / found.lanes:.1f} shards each",
        "epoch": f"{epoch}; ends at steps {ends}, ...",
        "micro-batches": f"{found.batches_per_rank:,} per rank and epoch, the same for all",
        "shards per node": f"{found.shards_per_node[0]:,} to {found.shards_per_node[1]:,} in an epoch,"
        f" {found.gigabytes_per_node:,.1f} GB",
        "open shards": f"at most {found.open_per_rank} per rank, {found.open_per_node} per node",
        "mixing": f"{found.shards_in_batch:.0f} different shards in a micro-batch of {micro}",
        "reading": f"{rate:,.1f} MB/s per node at {images_per_second:,.0f} images/s",
    }
    return "\n".join(f"{name:16} {value}" for name, value in rows.items())
