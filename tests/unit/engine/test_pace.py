"""A rank's own time: what it takes without what it waits for others."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.dist import waits as waiting
from pipeline.dist.waits import Waits
from pipeline.engine import pace as pacing
from pipeline.engine.pace import Pace
from pipeline.engine.paces import PaceKeeper
from pipeline.record.paces import PHASES, Stragglers, read_paces

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    monkeypatch.setattr(pacing, "time", clock)
    return clock


def test_each_phase_has_its_own_time_without_its_waits(clock, monkeypatch):
    def all_reduce(tensor: Any) -> None:
        clock.now += 7.0
        dist.barrier()  # one is made of others: counted once

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "barrier", lambda: setattr(clock, "now", clock.now + 20.0))
    waits = Waits(CPU)
    with waits.listening():
        pace = Pace(waits)
        for phase, own, waited in [("data", 1.0, 0), ("survey x", 2.0, 1), ("step", 4.0, 2)]:
            pace.at(phase)
            clock.now += own
            for _ in range(waited):
                dist.all_reduce(torch.ones(1))
        assert pace.take() == (1.0, 4.0, 0.0, 2.0)
        dist.barrier()  # the exchange
        for phase, own in [("log", 0.25), ("checkpoint", 8.0), ("data", 3.0), ("step", 5.0)]:
            pace.at(phase)
            clock.now += own
        assert pace.take() == (3.0, 5.0, 8.0, 0.25)
    assert waits.seconds == 3 * 27.0 + 20.0
    assert dist.all_reduce is all_reduce, "nothing is left of it"


def test_other_threads_and_failures(clock, monkeypatch):
    def fails() -> None:
        clock.now += 1.0
        raise RuntimeError("lost")

    def ignored() -> None:
        with suppress(RuntimeError):
            dist.barrier()

    monkeypatch.setattr(dist, "barrier", fails)
    waits = Waits(CPU)
    with waits.listening():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="lost"):
                dist.barrier()
        assert waits.seconds == 2.0
        thread = threading.Thread(target=ignored)
        thread.start()
        thread.join()
    assert waits.seconds == 2.0, "what saves in the background does not wait in the step"


@pytest.mark.world_size(2)
def test_work_begun_earlier_is_waited_for_here():
    """Rank 1 comes later; rank 0 has begun its part and waits for the rest of it."""
    dist.init_process_group("gloo")
    rank, waits = dist.get_rank(), Waits(CPU)
    with waits.listening():
        if rank == 1:
            threading.Event().wait(0.3)
        work = dist.all_reduce(torch.ones(4), async_op=True)
        assert work is not None
        work.wait()
    other = torch.tensor(waits.seconds, dtype=torch.float64)
    dist.broadcast(other, src=1)
    assert rank == 1 or waits.seconds > float(other)
    dist.destroy_process_group()


def test_windows_are_judged_and_kept(tmp_path):
    clock, said = Clock(), list[str]()
    keeper = PaceKeeper(tmp_path, 5, Stragglers(["a", "b"], 40.0), 4.0, said.append, clock.perf_counter)
    rows = torch.zeros(2, len(PHASES))
    for step in range(1, 21):  # of 20 s: three to a window of a minute
        clock.now += 20.0
        rows[:, 1] = torch.tensor([2.0, 2.0 if step <= 4 else 5.0])
        keeper.add(step, rows)
        if step == 5:
            paces = read_paces(tmp_path)
            assert paces is not None and (paces.step, paces.seconds, paces.slow) == (3, 20.0, [])
        if said:
            assert step == 12, "slow since step 5, in the second window: four windows end by step 15"
            break
    paces = read_paces(tmp_path)
    assert paces is not None and (paces.attempt, paces.step) == (5, 12)
    assert [slow.node for slow in paces.slow] == ["b"] and list(paces.own[1]) == [0.0, 5.0, 0.0, 0.0]
