"""The forecast against counting every shard that every rank reads."""

from dataclasses import replace

import numpy as np
import pytest

from launch.plan import plan_data as plan
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Manifest, Shard
from pipeline.data.forecast import covered, forecast
from pipeline.data.order import Order
from tests.unit.data.shards import write_data


def data(sizes):
    shards = tuple(Shard(f"{i}.tar", n, 1000 * n, "0" * 64) for i, n in enumerate(sizes))
    return Manifest("x", shards, {"image": ("jpg",)})


def test_covered_counts_places_once():
    first, last = np.array([0, 1, 1, 5]), np.array([2, 3, 4, 6])
    assert covered(first, last, 1).tolist() == [5]
    assert covered(first, last, 2).tolist() == [3, 4]
    assert covered(first, last, 4).tolist() == [2, 2, 3, 1]
    assert covered(first, last, 8).tolist() == [2, 2, 2, 2, 3, 3, 1, 1]


def lanes_of(part, parts, lanes):
    """The lanes that a rank or node reads; where there are more of these than lanes, they share lanes."""
    return slice(part * lanes // parts, -(-(part + 1) * lanes // parts))


@pytest.mark.parametrize("lanes", [2, 6, 24])
@pytest.mark.parametrize(("nodes", "world"), [(1, 2), (2, 4), (4, 12)])
def test_equals_counting(nodes, world, lanes):
    sizes = [7, 12, 5, 9, 14, 3, 8, 11, 6, 10, 4, 13]
    manifest = data(sizes)
    order = Order(np.array(manifest.starts), 3, 24, lanes, 2, "drop")
    found = forecast(manifest, order, nodes=nodes, world=world, micro_batch=24 // world)
    steps, shard_of = sum(sizes) // 24, np.repeat(np.arange(12), sizes)
    per_node = [
        len({s for t in range(steps) for s in shard_of[order.batch(t, n * 24 // nodes, (n + 1) * 24 // nodes).id]})
        for n in range(nodes)
    ]
    # A lane's last samples are left over, so a node may touch fewer shards than it covers, by one per lane at most.
    most = found.shards_per_node[1]
    assert max(per_node) <= most <= max(per_node) + max(1, lanes // nodes)
    assert found.batches_per_rank == steps and found.steps_per_epoch == steps
    assert found.left_over == sum(sizes) - 24 * steps
    assert found.bytes_per_sample == 1000
    for t in range(steps):
        for rank in range(world):
            own = shard_of[order.batch(t, rank * 24 // world, (rank + 1) * 24 // world).id]
            assert len(set(own)) <= found.open_per_rank
    assert found.open_per_rank <= found.open_per_node <= 12
    for parts, most_open in ((world, found.open_per_rank), (nodes, found.open_per_node)):
        places = [[set(range(*window)) for window in zip(*order.windows(t), strict=True)] for t in range(steps)]
        counts = [len(set().union(*lane[lanes_of(i, parts, lanes)])) for lane in places for i in range(parts)]
        assert most_open == max(counts)
    assert found.gigabytes_per_node == pytest.approx(found.shards_per_node[1] * sum(sizes) * 1000 / 12 / 1e9)
    endless = forecast(manifest, replace(order, tail="endless"), nodes=nodes, world=world, micro_batch=24 // world)
    assert endless.left_over == 0


def test_open_shards_stay_bounded_at_scale():
    """4,096 ranks on 512 nodes, 100,000 shards: each node keeps its windows open and no more."""
    manifest = data([10] * 100_000)
    order = Order(np.array(manifest.starts), 0, 65_536, 65_536, 4, "drop")
    found = forecast(manifest, order, nodes=512, world=4096, micro_batch=16)
    assert found.open_per_node <= 65_536 // 512 * 4
    assert found.batches_per_rank == 1_000_000 // 65_536
    assert found.shards_per_node[1] <= 100_000 / 512 + 2
    assert found.shards_in_batch >= 14


def test_plan_prints_what_a_run_would_read(tmp_path):
    write_data(tmp_path, [10, 10, 10, 10])
    shape = {"nodes": 1, "procs": 2, "micro_batch": None, "lanes": None, "window": 4}
    text = plan(str(tmp_path), global_batch=8, images_per_second=100.0, **shape)
    lines = dict(
        line.split(maxsplit=1) for line in text.splitlines() if not line.startswith(("global", "shards", "open"))
    )
    assert lines["data"].startswith("40 samples in 4 shards")
    assert lines["epoch"] == "5 steps, 0 samples left over; ends at steps 5, 10, 15, ..."
    assert lines["lanes"].startswith("4, 1.0 shards each")
    assert "8 = 2 ranks x 4 samples x 1" in text
    with pytest.raises(ConfigError, match="a global batch of 7 is not a multiple of 2 ranks"):
        plan(str(tmp_path), global_batch=7, images_per_second=1.0, **shape)
    with pytest.raises(ConfigError, match="more than the 40 samples"):
        plan(str(tmp_path), global_batch=80, images_per_second=1.0, **shape)
