"""Jobs of the other kinds, on a real SLURM: shards by an array of tasks."""

from __future__ import annotations

import pytest
import tomli_w

from launch import history, submit
from launch.submit import Request
from pipeline.core import manifest
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import environment

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def unchecked(monkeypatch, cluster: Cluster):
    """The check in the job's environment has a test of its own, and takes a while."""
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    with environment(cluster):
        yield


def test_each_task_of_an_array_makes_its_own_shards(cluster, tmp_path):
    out = tmp_path / "shards"
    words = ["glyphs", f"{out}/part-{{task}}", "--characters", "3", "--samples", "1", "--seed", "{task}"]
    config = tmp_path / "prepare.toml"
    config.write_text(tomli_w.dumps({"prepare": {"folder": str(out), "arguments": words}}))
    submit.submit(Request(config, array="1-2"), dry_run=False)
    job = history.last_job(out)
    for task in (1, 2):
        assert cluster.wait_state(f"{job}_{task}", "COMPLETED", "FAILED", seconds=200) == "COMPLETED"
        assert manifest.load(out / f"part-{task}" / "train").samples > 0
        (attempt,) = history.attempts(out / f"task-{task}")
        assert attempt.decision == "finished"
