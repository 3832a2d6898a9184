"""Kills and changes of world size, by real processes, against one undisturbed run."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.manifest import load
from pipeline.data.order import Order
from pipeline.data.storage import Local
from tests.ranks import forkserver
from tests.unit.data.shards import write_data
from tests.unit.data.test_stream import open_rank, steps_of

SIZES = [5, 0, 9, 1, 20, 13]
SETTINGS = {"micro": 1, "tail": "endless", "fields": ("label",), "batch": 12, "lanes": 4}
# (ranks, loader processes, steps after which all ranks are killed)
SCHEDULE = [(1, 0, 2), (3, 0, 1), (2, 1, 3), (4, 0, 2), (12, 0, 1), (2, 0, 4)]


def rank_main(folder: str, notes: str, rank: int, world: int, workers: int, first: int) -> None:
    """Note the ids of each step until killed."""
    stream = open_rank(load(folder), rank=rank, world=world, workers=workers, **SETTINGS)
    with open(notes, "w") as f:
        for step, parts in enumerate(stream.batches(first), start=first):
            pairs = [pair for b in parts for pair in zip(b["epoch"].tolist(), b["id"].tolist(), strict=True)]
            print(json.dumps([step, pairs]), file=f, flush=True)
            time.sleep(0.01)


def finished(notes: list[str]) -> list[dict[int, list]]:
    """What each rank has noted; half-written lines are not counted, as a checkpoint that was not finished is not."""
    found = []
    for path in notes:
        lines = Path(path).read_text().split("\n")[:-1] if os.path.exists(path) else []
        found.append(dict(map(json.loads, lines)))
    return found


@pytest.mark.parametrize(("sizes", "lanes", "window"), [([30] * 40, 4, 2), ([7, 90, 1, 0, 200, 13, 64, 25], 8, 4)])
def test_resuming_reads_no_more_than_one_window_of_each_lane(tmp_path, monkeypatch, sizes, lanes, window):
    """At any position of an epoch: bytes are counted where they are read, and which shards they come from."""
    manifest = write_data(tmp_path, sizes, lambda n: {"cls": b"1", "png": bytes(100)})
    asked = []
    read = Local.read

    def counted(self, ranges, into):
        asked.append((ranges.shard.name, ranges.bytes))
        read(self, ranges, into)

    monkeypatch.setattr(Local, "read", counted)
    settings = {"fields": ("label",), "batch": 8, "micro": 8, "lanes": lanes, "window": window}
    order = Order(np.array(manifest.starts), 1, 8, lanes, window, "drop")
    kept = [manifest.shards[i] for i in order._epoch(0).shard]
    for step in range(0, sum(sizes) // 8, 7):
        asked.clear()
        stream = open_rank(manifest, **settings)
        next(stream.batches(step))
        stream.close()
        first, last = order.windows(step)
        allowed = {s.name for a, b in zip(first, last, strict=True) for s in kept[a:b]}
        assert {name for name, _ in asked} <= allowed
        windows = sum(s.bytes for a, b in zip(first, last, strict=True) for s in kept[a:b])
        # A header, a label, and at most eight blocks between it and the next one.
        assert sum(count for _, count in asked) <= min(windows, 8 * (513 + 4096))


def test_kills_and_other_world_sizes_lose_and_repeat_nothing(tmp_path):
    folder = tmp_path / "data"
    write_data(folder, SIZES)
    context, at, delivered = forkserver(), 0, []
    for stage, (world, workers, length) in enumerate(SCHEDULE):
        notes = [str(tmp_path / f"{stage}-{rank}") for rank in range(world)]
        ranks = [
            context.Process(target=rank_main, args=(str(folder), notes[r], r, world, workers, at)) for r in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 120
        while min(len(done) for done in finished(notes)) < length:
            assert time.monotonic() < deadline and all(p.is_alive() for p in ranks)
            time.sleep(0.02)
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
            process.close()
        done = finished(notes)
        until = at + min(len(d) for d in done)
        delivered += [[tuple(pair) for d in done for pair in d[step]] for step in range(at, until)]
        at = until
    whole = steps_of(load(folder), 0, at, **SETTINGS)
    expected = [list(zip(b["epoch"].tolist(), b["id"].tolist(), strict=True)) for b in whole]
    assert delivered == expected
    assert max(epoch for epoch, _ in delivered[-1]) >= 3
    flat = [pair for step in delivered for pair in step]
    assert len(set(flat)) == len(flat)
    assert {i for e, i in flat if e == 1} == set(range(48))
