"""Planning a million shards and a billion samples; an epoch of 4,096 ranks; how well shards are mixed.

python -m tests.perf.stream_plan
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np

from pipeline.core.manifest import Manifest, Shard
from pipeline.data.forecast import covered, forecast
from pipeline.data.order import Order, default_lanes
from tests.perf.stream_corpus import trials

NODES, WORLD, MICRO = 512, 4096, 64


def peak_mb() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planning(rounds: int) -> None:
    """Time from the shard sizes to the first batch of a rank, and of a look-up."""
    sizes = np.random.default_rng(0).integers(800, 1201, 1_000_000)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    batch = WORLD * MICRO
    lanes = default_lanes(batch, len(sizes), int(starts[-1]))
    before, seconds, look_ups = peak_mb(), [], []
    for trial in range(rounds):
        order = Order(starts, trial, batch, lanes, 4, "drop")
        start = time.perf_counter()
        order.batch(1000, 2047 * MICRO, 2048 * MICRO)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for step in range(100):
            order.batch(step * 7, 2047 * MICRO, 2048 * MICRO)
        look_ups.append((time.perf_counter() - start) / 100 / MICRO)
    print(f"1,000,000 shards, {starts[-1]:,} samples, rank 2,047 of {WORLD:,}, {lanes:,} lanes:")
    print(f"  first batch at step 1000: {statistics.median(seconds) * 1e3:.0f} ms, {peak_mb() - before:.0f} MB more")
    print(f"  look-up: {statistics.median(look_ups) * 1e6:.2f} us per sample")


def epoch() -> None:
    """Walk all lanes of an epoch of 4,096 ranks and count."""
    sizes = np.random.default_rng(1).integers(800, 1201, 100_000)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    batch = WORLD * MICRO
    order = Order(starts, 0, batch, default_lanes(batch, len(sizes), int(starts[-1])), 4, "drop")
    steps = int(order.steps_per_epoch)
    most = [covered(*order.windows(step), NODES) for step in range(steps)]
    share = batch // order.lanes
    lengths = np.diff([lane * order.samples // order.lanes for lane in range(order.lanes + 1)])
    full = lengths // share
    print(f"\n100,000 shards, {starts[-1]:,} samples, {NODES} nodes of 8 ranks, micro-batch {MICRO}:")
    print(
        f"  batches per rank: {steps:,} for every rank"
        f" (the shortest lane has {full.min():,}, the longest {full.max():,})"
    )
    print(f"  shards open per node, all {steps:,} steps: {min(m.min() for m in most)} to {max(m.max() for m in most)}")


def mixing() -> None:
    """Different shards in a device batch of 64 from 1,000 shards of 1,000 samples on 64 ranks."""
    shards = tuple(Shard(f"{i}.tar", 1000, 10**8, "0" * 64) for i in range(1000))
    manifest = Manifest("", shards, {})
    batch = 64 * 64
    lanes = default_lanes(batch, 1000, manifest.samples)
    print("\ndifferent shards in a device batch of 64 (1,000 shards, 64 ranks):")
    for title, count in (("default lanes", lanes), ("lanes = global batch", batch)):
        order = Order(np.array(manifest.starts), 0, batch, count, 4, "drop")
        found = forecast(manifest, order, nodes=8, world=64, micro_batch=64)
        print(
            f"  ours, {title + ' = ' + str(count):32} {found.shards_in_batch:5.1f}"
            f"   open per node {found.open_per_node}"
        )
    rng = np.random.default_rng(0)
    # webdataset: shards are dealt out to 64 ranks x 8 workers; each reads its own through a buffer of 5,000 samples.
    buffer = [np.repeat(rng.choice(1000, 2, replace=False), 1000) for _ in range(50)]
    kinds = [len(np.unique(rng.choice(b, 64, replace=False))) for b in buffer]
    print(f"  {'webdataset, 8 workers, buffer 5,000':38} {np.mean(kinds):5.1f}")
    print(f"  {'Mosaic streaming py1e (reported)':38} {50:5.1f}")


def main() -> None:
    """All three."""
    rounds = trials(__doc__)
    planning(rounds)
    epoch()
    mixing()


if __name__ == "__main__":
    main()
