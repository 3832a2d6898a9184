"""Kills and changes of world size, by real processes, against one undisturbed run."""

import json
import os
import signal
import time
from pathlib import Path

from pipeline.core.manifest import load
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
