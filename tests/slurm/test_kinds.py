"""Jobs of the other kinds, on a real SLURM: shards by an array of tasks, and a suite of evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from launch import history, submit
from launch.submit import Request
from pipeline.core import manifest
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import environment, profile

pytestmark = pytest.mark.slurm
SUITE = Path(__file__).parents[2] / "configs" / "eval" / "glyphs.toml"


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


def test_a_suite_is_evaluated_in_one_process(cluster, tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    monkeypatch.setattr(submit, "PROGRAM", "tests.slurm.recorder")
    place = profile(tmp_path / "p.toml", environment={"SLUICE_TEST_RECORD": str(tmp_path / "record")}, ranks_per_node=2)
    submit.submit(Request(SUITE, run=tmp_path / "run", cluster=str(place)), dry_run=False)
    notes = tmp_path / "run" / "launch" / "eval-glyphs"
    job = str(history.last_job(notes))
    assert cluster.wait_state(job, "COMPLETED", "FAILED", seconds=200) == "COMPLETED"
    record = json.loads((tmp_path / "record0").read_text())
    copy = notes / "launch" / "config-001.toml"
    assert record["arguments"] == ["eval", "--run", str(tmp_path / "run"), "--suite", str(copy)]
    assert record["environment"]["WORLD_SIZE"] == "1" and not (tmp_path / "record1").exists()
