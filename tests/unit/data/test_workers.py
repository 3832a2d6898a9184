"""Loader processes: exact order, restart, and every way in which a process can end."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.config.schema import Data
from pipeline.core.errors import DataError
from pipeline.data.assemble import Assembler
from pipeline.data.reading import EvalReading
from pipeline.data.workers import Workers
from tests.unit.data.shards import write_data
from tests.unit.data.test_stream import IMAGE, assert_same, open_rank, spoil, steps_of

SIZES = [5, 0, 9, 1, 20, 13]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), SIZES, spoil({7}))


def children(parent: int) -> list[int]:
    """Processes started by ``parent``, and theirs."""
    with open(f"/proc/{parent}/task/{parent}/children") as f:
        own = [int(pid) for pid in f.read().split()]
    return own + [pid for child in own for pid in children(child)]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still there: {[p for p in pids if alive(p)]}"
        time.sleep(0.02)


def started(workers: Workers) -> list[int]:
    """The loader processes, in order, once they are there."""
    nursery = workers._process.pid
    while len(found := children(nursery)) < len(workers._pipes):
        time.sleep(0.01)
    return sorted(found)


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)]
)
def test_same_stream_as_without(data, workers):
    """Ids, pixels, labels and ledger; from the start, and from other steps in the same processes.

    What was delivered is compared at the end: nothing that came later may have been written over it.
    """
    settings = {"max_bad": 0.5, "tail": "endless", "micro": 4}
    expected = steps_of(data, 0, 7, **settings)
    here = open_rank(data, **settings)
    list(itertools.islice(here.batches(0), 7))
    stream = open_rank(data, workers=workers, **settings)
    delivered = {}
    for first in (0, 5, 2):
        delivered[first] = list(itertools.islice(stream.batches(first), 7 - first))
        if first == 0:
            assert stream.ledger() == here.ledger() != []
    stream.close()
    for first, steps in delivered.items():
        found = [{key: torch.cat([micro[key] for micro in parts]) for key in parts[0]} for parts in steps]
        assert_same(expected[first:], found)


def test_killed_worker_is_reported_and_closing_leaves_nothing(data):
    stream = open_rank(data, workers=2, max_bad=0.5)
    batches = stream.batches(0)
    next(batches)
    nursery, pids = stream._workers._process.pid, started(stream._workers)
    for pid in [nursery, *pids]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    next(batches)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(DataError, match="loader process 1 was killed by SIGKILL; the machine may be out of memory"):
        list(itertools.islice(batches, 100))
    stream.close()
    wait_until_gone([nursery, *pids])


def test_killed_nursery_is_reported(data):
    """Also by the end of one worker while others live on."""
    stream = open_rank(data, workers=2, max_bad=0.5)
    batches = stream.batches(0)
    next(batches)
    pids = started(stream._workers)
    os.kill(stream._workers._process.pid, signal.SIGKILL)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(DataError, match="parent of the loader processes was killed by SIGKILL"):
        list(itertools.islice(batches, 100))
    stream.close()


RANK = """
import sys, time
sys.path.insert(0, {root!r})
from pipeline.core.manifest import load
from tests.unit.data.test_stream import open_rank
from tests.unit.data.test_workers import started
stream = open_rank(load({data!r}), workers=2, max_bad=0.5)
batches = stream.batches(0)
next(batches)
print(stream._workers._process.pid, *started(stream._workers), flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "number"),
    [("time.sleep(1000)", signal.SIGKILL), ("time.sleep(1000)", signal.SIGINT), ("", None)],
    ids=["killed", "interrupted", "finished without closing"],
)
def test_nothing_outlives_the_rank(data, end, number):
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "../../.."))
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK.format(root=root, data=data.root, end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    pids = [int(pid) for pid in rank.stdout.readline().split()]
    assert len(pids) == 3
    if number is not None:
        os.kill(rank.pid, number)
    rank.wait()
    rank.stdout.close()
    wait_until_gone(pids)


class Stuck(Assembler):
    """Never ends micro-batch 1, as where a file system does not answer."""

    def fill(self, number, arrays):
        if number == 1:
            self.note.touch()
            time.sleep(1000)
        return super().fill(number, arrays)


def test_closing_leaves_no_worker_that_is_stuck(data, tmp_path):
    assembler = Stuck(data, Data(train=data.root, fields=("label",)), 0, EvalReading(8, 45, 7))
    assembler.note = tmp_path / "stuck"
    workers = Workers(assembler, 1)
    next(workers.batches(0))
    pids = [workers._process.pid, *started(workers)]
    while not assembler.note.exists():
        time.sleep(0.01)
    workers.close()
    wait_until_gone(pids)


class Faulty(Assembler):
    """Fails at micro-batch 1: with a bug for even ids of plan, with damage for odd."""

    def fill(self, number, arrays):
        if number == 1:
            raise ZeroDivisionError("a bug")
        if number == 2:
            raise DataError("x.tar is damaged")
        return super().fill(number, arrays)


def test_errors_of_workers_reach_the_rank_and_the_last_batch_is_smaller(data):
    settings = Data(train=data.root, fields=("image", "label"), image=IMAGE)
    workers = Workers(Faulty(data, settings, 0, EvalReading(8, 45, 7)), 2)
    batches = workers.batches(0)
    first = next(batches).batch
    assert first["id"].tolist() == list(range(8, 15))
    with pytest.raises(RuntimeError, match=r"loader process 1 failed:(.|\n)*ZeroDivisionError: a bug"):
        next(batches)
    with pytest.raises(DataError, match=r"x\.tar is damaged"):
        next(workers.batches(2))
    rest = [made.batch["id"].numpy() for made in workers.batches(3)]
    np.testing.assert_array_equal(np.concatenate(rest), np.arange(8 + 21, 45))
    assert len(rest[-1]) == 2
    workers.close()
