"""Ranks that are killed or stopped, a second job, and signals to every process, in runs started by the launcher."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launch.supervise import session_members
from pipeline.record.state import read_state
from tests.faults.launched import LONG, MIDDLE, gone, launched, wait_until
from tests.integration.runs import codes, metrics, notes, overrides, run

HANG = "engine.hang_minutes=0.1"


def goes_on(folder, glyphs, long_whole, began, row, *more):
    """Start again; the run must end as if nothing had happened. Fills in the time until it trains."""
    with launched(folder, glyphs / "train", *more) as again:
        again.wait_for_step(1)
        row.seconds = time.monotonic() - began
        assert again.wait()[0] == 0
    assert metrics(folder) == metrics(long_whole)
    assert "resumed from" in notes(folder)
    row.outcome = "all processes end; the next start has the same batches and losses"


def shared_memory():
    """DeepSpeed's files in shared memory."""
    return set(Path("/dev/shm").glob("deepspeed*"))


def kill_a_rank(glyphs, tmp_path, monkeypatch):
    """In the middle of a run; when that was, and when all processes were gone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    before = shared_memory()
    with launched(tmp_path, glyphs / "train") as run:
        beats = run.wait_for_step(MIDDLE)
        os.kill(beats[1].pid, signal.SIGKILL)
        began = time.monotonic()
        code, said = run.wait()
    assert code == 1 and "start it again" in said
    assert all(gone(b.pid) for b in beats)
    # DeepSpeed's shared-memory all-reduce: nobody needs it, compiling it takes half a minute, and a kill leaves 69 MB.
    assert not (tmp_path / "compiled").exists() and shared_memory() <= before
    return began, time.monotonic()


@pytest.mark.slow
@pytest.mark.fault(1, "SIGKILL a rank mid-step")
def test_a_killed_rank(glyphs, long_whole, tmp_path, fault_row, monkeypatch):
    began, ended = kill_a_rank(glyphs, tmp_path, monkeypatch)
    fault_row.case = f"2 local ranks, ZeRO 1; all gone after {ended - began:.1f} s"
    goes_on(tmp_path, glyphs, long_whole, began, fault_row)


def test_a_killed_rank_ends_all_and_the_run_goes_on(glyphs, long_whole, tmp_path, monkeypatch):
    """Row 1 of the fault matrix, but that the second start is without the launcher."""
    kill_a_rank(glyphs, tmp_path, monkeypatch)
    assert codes(run(2, "supervised", overrides(tmp_path, glyphs / "train", *LONG))) == [0, 0]
    assert metrics(tmp_path) == metrics(long_whole)
    assert "resumed from" in notes(tmp_path)


@pytest.mark.slow
@pytest.mark.fault(6, "SIGSTOP a rank: a hang")
def test_a_stopped_rank(glyphs, long_whole, tmp_path, fault_row):
    fault_row.case = "2 local ranks, ZeRO 1; a step may take 6 s"
    with launched(tmp_path, glyphs / "train", HANG) as run:
        beats = run.wait_for_step(MIDDLE)
        os.kill(beats[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        code, said = run.wait()
    assert code == 1
    assert f"rank 1 (process {beats[1].pid} on {beats[1].host}) does not answer" in said
    assert all(gone(b.pid) for b in beats)
    state = read_state(tmp_path)
    assert state is not None and state.error is not None and "rank 1 (process" in state.error and state.rank == 0
    assert "train.py" in (tmp_path / "stacks" / "rank-00000.txt").read_text()
    goes_on(tmp_path, glyphs, long_whole, began, fault_row)


@pytest.mark.slow
@pytest.mark.fault(6, "SIGSTOP a rank, then SIGKILL another")
def test_a_hang_while_another_rank_dies(glyphs, long_whole, tmp_path, fault_row):
    fault_row.case = "2 local ranks, ZeRO 1"
    with launched(tmp_path, glyphs / "train") as run:
        beats = run.wait_for_step(MIDDLE)
        os.kill(beats[1].pid, signal.SIGSTOP)
        os.kill(beats[0].pid, signal.SIGKILL)
        began = time.monotonic()
        assert run.wait()[0] == 1
    assert all(gone(b.pid) for b in beats)
    goes_on(tmp_path, glyphs, long_whole, began, fault_row)


@pytest.mark.slow
@pytest.mark.fault(6, "SIGSTOP a rank: the collectives' own time-out")
@pytest.mark.parametrize("engine", ["zero=1", "zero=3"])
def test_the_time_out_reaches_the_gradients(engine, glyphs, long_whole, tmp_path, fault_row):
    fault_row.case = f"2 local ranks, {engine}, engine.timeout_minutes = 0.1"
    with launched(tmp_path, glyphs / "train", "engine.timeout_minutes=0.1", f"engine.{engine}") as run:
        beats = run.wait_for_step(MIDDLE)
        os.kill(beats[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        assert run.wait()[0] == 1
        fault_row.seconds, fault_row.until = time.monotonic() - began, "stopped"
    assert all(gone(b.pid) for b in beats)
    fault_row.outcome = "the other rank's all-reduce gives up; all processes end"


@pytest.mark.slow
@pytest.mark.fault(14, "a second job on the same run folder")
def test_a_second_job(glyphs, long_whole, tmp_path, fault_row):
    fault_row.case = "2 local ranks each"
    with launched(tmp_path, glyphs / "train") as first:
        beats = first.wait_for_step(1)
        began = time.monotonic()
        with launched(tmp_path, glyphs / "train") as second:
            code, said = second.wait()
        fault_row.seconds, fault_row.until = time.monotonic() - began, "stopped"
        assert code == 2 and f"in use by process {beats[0].pid} on {beats[0].host}" in said
        assert not gone(beats[0].pid)
        assert first.wait()[0] == 0
    assert metrics(tmp_path) == metrics(long_whole)
    fault_row.outcome = "refused with exit 2, names the first; the first is undisturbed"


@pytest.mark.slow
@pytest.mark.fault(4, "SIGTERM and SIGUSR1 to every process of the job, loader workers too")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_every_process_is_signalled(number, glyphs, long_whole, tmp_path, fault_row):
    """As SLURM does; a launcher that dies of it is the launcher's affair, so only what the ranks started is hit."""
    fault_row.case = f"{number.name}, 2 local ranks with 2 loader workers each"
    more = ("data.workers=2",)
    with launched(tmp_path, glyphs / "train", *more) as run:
        beats = run.wait_for_step(MIDDLE)
        ranks = [b.pid for b in beats]
        members = session_members(os.getsid(ranks[0]))
        signalled = [m for m in members if _below(m.pid, ranks)]
        assert len(signalled) >= 8  # 2 ranks, 2 nurseries, 4 workers
        for process in signalled:
            process.send(number)
        began = time.monotonic()
        assert run.wait()[0] == 75
    wait_until(lambda: all(gone(m.pid) for m in signalled), "end of all processes")
    goes_on(tmp_path, glyphs, long_whole, began, fault_row, *more)


def _below(pid, ancestors):
    """Whether a process descends from one of ``ancestors``."""
    while pid > 1:
        if pid in ancestors:
            return True
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
    return False
