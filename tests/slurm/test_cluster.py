"""The cluster that the other tests stand on: a job runs on two nodes, and one that is cancelled leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_tests_that_are_killed_leave_nothing(cluster: Cluster):
    code = (
        "import os\n"
        "from tests.slurm.cluster import Cluster\n"
        "c = Cluster(['n1']).__enter__()\n"
        "c.wait_state(c.run('sbatch', '--parsable', '--output=/dev/null', '--wrap', 'sleep 600'), 'RUNNING')\n"
        "print(c.folder, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    folder = Path(killed.stdout.strip())
    assert killed.returncode == -9 and folder.name.startswith("sluice-slurm-"), killed.stderr
    wait_for(lambda: not folder.exists(), 30, "the folder gone")
    wanted = f"SLURM_CONF={folder}/slurm.conf".encode()
    environments = [p for p in Path("/proc").glob("[0-9]*/environ") if os.access(p, os.R_OK)]
    assert not [p for p in environments if wanted in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # gone meanwhile
