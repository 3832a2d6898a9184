"""The cluster that the other tests stand on: a job runs on two nodes, and one that is cancelled leaves nothing."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_two_nodes(cluster: Cluster, tmp_path):
    out = tmp_path / "out"
    wrap = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_PROCID'"
    job = cluster.run("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", f"--output={out}", "--wrap", wrap)
    cluster.wait_state(job, "COMPLETED")
    assert sorted(out.read_text().split("\n")) == ["", "n1 0", "n2 1"]


def test_a_cancelled_job_leaves_nothing(cluster: Cluster):
    job = cluster.run("sbatch", "--parsable", "-N1", "--output=/dev/null", "--wrap", "srun sleep 600")
    cluster.wait_state(job, "RUNNING")
    wait_for(lambda: len(cluster.processes("SLURM_JOB_ID", job)) > 1, 20, "the step")
    cluster.run("scancel", job)
    cluster.wait_state(job, "CANCELLED")
    wait_for(lambda: not cluster.processes("SLURM_JOB_ID", job), 20, "nothing")
