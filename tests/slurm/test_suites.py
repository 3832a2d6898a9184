"""A suite on a real SLURM: an array of subjects, of which one is killed and one queued again in the middle."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from launch import history, submit
from launch.evaluations import Order, submit_suite
from pipeline.config.load import dump
from pipeline.record.results import read_results
from tests.contracts.components import smoke_config
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import START_SECONDS, environment, profile

pytestmark = pytest.mark.slurm


def ranks(cluster: Cluster, task: int) -> list[int]:
    """Processes that evaluate in a task of the array."""
    found: list[int] = []
    for pid in cluster.processes("SLURM_ARRAY_TASK_ID", str(task)):
        with suppress(OSError):  # it may have ended by now; of one that is just ending the command line is empty
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2:3] == [b"tests.slurm.held_eval"]:
                found.append(pid)
    return found


def test_tasks_that_are_killed_or_queued_again_do_what_is_left_and_failures_are_no_crash(
    cluster, glyphs, tmp_path, monkeypatch
):
    """One of three evaluations fails on every subject: the array ends all the same, and nothing is measured twice."""
    config = smoke_config("mae")
    data = config.data.model_copy(update={"train": str(glyphs / "train")})
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
        (run / "config.toml").write_text(dump(config.model_copy(update={"data": data})))
    suite = tmp_path / "mine.toml"
    suite.write_text(
        f'workers = 0\n[streams]\ntrain = "{glyphs}/train"\nval = "{glyphs}/val"\n'
        '[[evals]]\nname = "knn"\nk = [3]\n[[evals]]\nname = "accuracy"\n[[evals]]\nname = "rank"\n'
    )
    monkeypatch.setattr(submit, "PROGRAM", "tests.slurm.held_eval")
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    cluster.empty()
    go = tmp_path / "go"
    place = profile(tmp_path / "profile.toml", environment={"SLUICE_TEST_GO": str(go)})
    order = Order(suite, [f"random:{run}" for run in runs], cluster=str(place))
    with environment(cluster):
        said = submit_suite(order, dry_run=False)
        again = submit_suite(order, dry_run=False)
    assert again.endswith("nothing to submit") and f"sluice report {runs[0]} {runs[1]}" in said
    job = said.partition("job ")[2].partition(":")[0]

    def first() -> list[float]:
        return [path.stat().st_mtime for run in runs for path in run.glob("results/knn-*.json")]

    def now() -> str:
        logs = sorted(tmp_path.glob("*/launch/eval-mine/slurm-*.out"))
        return cluster.run("squeue") + "".join(log.read_text()[-2000:] for log in logs)

    wait_for(lambda: len(first()) == 2, START_SECONDS, "the first evaluation of both", now)
    before = first()
    (rank,) = ranks(cluster, 0)
    os.kill(rank, signal.SIGKILL)
    cluster.run("scontrol", "requeue", f"{job}_1")
    wait_for(lambda: rank not in ranks(cluster, 0) and not ranks(cluster, 1), 60, "the end of both", now)
    go.touch()
    notes = [next(run.glob("launch/eval-mine/*/")) for run in runs]
    over = lambda: all("stop" in [a.decision for a in history.attempts(folder)] for folder in notes)  # noqa: E731
    wait_for(over, START_SECONDS, "the end of all", now)
    for folder, decision in zip(notes, ("restart", "requeue"), strict=True):
        made = history.attempts(folder)
        assert [a.decision for a in made] == [decision, "stop"] and "have failed, and said why" in made[-1].reason
    assert first() == before
    for run in runs:
        results = read_results(run)
        assert {row.evaluation for row in results.rows} == {"knn", "rank"}
        (failed,) = results.failed
        assert failed.task == "accuracy"
        assert len(list((run / "results").glob("*.json"))) == 2
