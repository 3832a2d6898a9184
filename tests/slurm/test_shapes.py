"""Runs of a real SLURM that go on in another shape, and a run folder that two jobs want."""

from __future__ import annotations

import shutil
import time

import pytest

from launch import submit
from tests.integration.runs import metrics
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import START_SECONDS, train

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900), pytest.mark.slow]


@pytest.mark.fault(12, "resume on one node fewer and one more")
def test_another_number_of_nodes(cluster, shards, tmp_path, fault_row):
    shape = ("run.global_batch=12", "optimizer.weight_decay=0.1")
    undisturbed = train(cluster, tmp_path / "whole", shards, *shape, pause=0.0)
    undisturbed.wait("COMPLETED")
    expected = metrics(undisturbed.folder)
    first = train(cluster, tmp_path / "run", shards, *shape)
    first.wait_step(4)
    cluster.run("scancel", first.job)
    first.wait("CANCELLED")
    wait_for(lambda: first.attempts, START_SECONDS, "the end of the first job", first.said)
    seconds = []
    for nodes in (1, 3):
        folder = tmp_path / f"on-{nodes}"
        shutil.copytree(first.folder, folder)
        cluster.empty()
        began = time.time()
        again = train(cluster, folder, shards, *shape, nodes=nodes, pause=0.0)
        seconds.append(again.seconds_to_next_step(began))
        again.wait("COMPLETED")
        found = metrics(folder)
        assert sorted(found) == sorted(expected)
        for step, line in expected.items():
            assert found[step]["data_digest"] == line["data_digest"], step
            assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), step
    fault_row.case, fault_row.seconds = "SLURM, 2 to 1 and 3 nodes, ZeRO 1, AdamW in groups", max(seconds)
    fault_row.outcome = "submitted again: same batches; losses as undisturbed but for the order of sums"


@pytest.mark.fault(14, "a second job on the same run folder")
def test_a_second_job(cluster, shards, whole, tmp_path, fault_row, monkeypatch):
    first = train(cluster, tmp_path / "run", shards)
    first.wait_step(4)
    process = first.beat(0)
    monkeypatch.setattr(submit, "_not_queued", lambda folder, request: "")  # as from another checkout of another user
    began = time.time()
    second = train(cluster, tmp_path / "run", shards, nodes=1)
    second.wait("FAILED")
    fault_row.seconds, fault_row.until = time.time() - began, "stopped"
    assert "ExitCode=2:0" in cluster.run("scontrol", "show", "job", second.job)
    assert f"is in use by process {process.pid} on {process.host}, SLURM job {first.job}" in second.said()
    first.same_to_the_end(whole)
    assert first.decisions == ["finished"]
    fault_row.case = "SLURM, a job of 2 nodes and one of 1"
    fault_row.outcome = "refused with exit 2, names the first; the first is undisturbed"
