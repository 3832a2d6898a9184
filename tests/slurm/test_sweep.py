"""A sweep on a real SLURM: an array with a limit, each run saved, requeued and known as if it had come alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from launch import array, control, history, status, submit
from launch.sweep import Asked
from tests.integration.runs import SMOKE
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import START_SECONDS, environment, profile

pytestmark = pytest.mark.slurm
NAMES = ["lr=1e-4", "lr=0.5", "lr=1e6"]


@pytest.fixture
def asked(cluster: Cluster, glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """A sweep of three runs that pretend to train, the last of which fails for good."""
    values = {
        "base": [str(SMOKE / "mae.toml")],
        "run": {"folder": str(tmp_path / "runs"), "length": "6ba"},
        "data": {"train": str(glyphs / "train")},
        "sweep": {"grid": {"optimizer.lr": [1e-4, 0.5, 1e6]}},
    }
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(values))
    monkeypatch.setattr(submit, "PROGRAM", "tests.unit.launch.fake_sweep")
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    cluster.empty()
    with environment(cluster):
        yield Asked(tmp_path / "sweep.toml")


def shape(tmp_path: Path, pause: float = 0.0, at_once: int | None = None) -> array.Shape:
    place = profile(tmp_path / "profile.toml", environment={"FAKE_SWEEP_PAUSE": str(pause)})
    return array.Shape(1, cluster=str(place), at_once=at_once)


def counted(folder: Path, what: str) -> list[int]:
    files = [folder / name / what for name in NAMES]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def test_an_array_with_a_limit_does_each_run_once(cluster, asked, tmp_path):
    """One task at a time; one that is queued again by its owner goes on, and given again nothing is submitted twice."""
    said = array.submit_sweep(asked, shape(tmp_path, pause=0.5, at_once=1), dry_run=False)
    job = said.rpartition("job ")[2].partition(":")[0]
    runs = tmp_path / "runs"
    folders = [runs / name for name in NAMES]
    assert [history.last_job(folder) for folder in folders] == [f"{job}_{n}" for n in range(3)]
    wait_for(lambda: counted(runs, "steps")[0] >= 2, START_SECONDS, "steps of the first run", lambda: said)
    phases = [phase for phase, _ in status.phases(folders).values()]
    assert phases == ["running", "queued", "queued"]
    again = array.submit_sweep(asked, shape(tmp_path), dry_run=False)
    assert "queued or running: lr=1e-4, lr=0.5, lr=1e6" in again and again.endswith("nothing to submit")
    cluster.run("scontrol", "requeue", f"{job}_0")

    def over() -> bool:
        return not cluster.run("squeue", "-h", "--array", "--jobs", job, "--states=PD,R,CG,RQ,RF", "-o", "%i %T")

    wait_for(over, START_SECONDS, "the end of the array", lambda: cluster.run("squeue"))
    assert counted(runs, "steps") == [6, 6, 0] and counted(runs, "starts") == [2, 1, 1]
    assert [a.decision for a in history.attempts(folders[0])] == ["requeue", "finished"]
    assert [history.attempts(folder)[-1].decision for folder in folders[1:]] == ["finished", "stop"]
    assert (folders[1] / "launch" / f"slurm-{job}_1.out").read_text().count("the run has reached its length") == 1
    last = array.submit_sweep(asked, shape(tmp_path), dry_run=False)
    assert "finished: lr=1e-4, lr=0.5" in last and "failed for good: lr=1e6" in last
    assert last.endswith("nothing to submit")
    retried = array.submit_sweep(asked._replace(retry=True), shape(tmp_path), dry_run=True)
    assert "task 0: lr=1e6" in retried and "--array=0-0" in retried


def test_one_run_of_an_array_is_cancelled_alone(cluster, asked, tmp_path):
    array.submit_sweep(asked, shape(tmp_path, pause=0.5), dry_run=False)
    runs = tmp_path / "runs"
    wait_for(lambda: min(counted(runs, "steps")[:2]) >= 1, START_SECONDS, "both at work", lambda: cluster.run("squeue"))
    control.cancel(runs / NAMES[1])
    ended = lambda: all(history.attempts(runs / name) for name in NAMES)  # noqa: E731
    wait_for(ended, START_SECONDS, "the end of all", lambda: cluster.run("squeue"))
    assert [history.attempts(runs / name)[-1].reason for name in NAMES[:2]] == [
        "the run has reached its length",
        "the job was cancelled",
    ]
    steps = counted(runs, "steps")
    assert steps[0] == 6 and 1 <= steps[1] < 6
