"""Ranks of a real SLURM job that hang: found, ended on every node, and started again."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.slurm.jobs import train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.slow]


@pytest.mark.fault(6, "SIGSTOP a rank: a hang")
def test_a_stopped_rank(cluster, shards, whole, tmp_path, fault_row):
    job = train(cluster, tmp_path / "run", shards, "engine.hang_minutes=0.1")
    job.wait_step(4)
    stopped = job.beat(1)
    os.kill(stopped.pid, signal.SIGSTOP)
    fault_row.seconds = job.seconds_to_next_step(time.time())
    job.same_to_the_end(whole)
    assert job.decisions == ["restart", "finished"], job.said()
    assert f"rank 1 (process {stopped.pid} on {stopped.host}) does not answer" in job.said()
    assert "train.py" in (job.folder / "stacks" / "rank-00000.txt").read_text()
    fault_row.case = "SLURM, 2 nodes; a step may take 6 s"
    fault_row.outcome = "the watchdog names the rank and ends the job; restart inside the allocation, same batches"


@pytest.mark.fault(6, "SIGSTOP a rank, then SIGKILL another")
def test_a_hang_while_another_rank_dies(cluster, shards, whole, tmp_path, fault_row):
    """A plain srun would wait for the stopped rank for ever."""
    job = train(cluster, tmp_path / "run", shards)
    job.wait_step(4)
    os.kill(job.beat(0).pid, signal.SIGSTOP)
    os.kill(job.beat(1).pid, signal.SIGKILL)
    fault_row.seconds = job.seconds_to_next_step(time.time())
    job.same_to_the_end(whole)
    assert job.decisions == ["restart", "finished"], job.said()
    fault_row.case = "SLURM, 2 nodes"
    fault_row.outcome = "srun ends the stopped rank as well; restart inside the allocation, same batches"
