"""What `sluice status` believes when its sources disagree: SLURM, the run's state, its ranks, and its jobs' history."""

from __future__ import annotations

import json
import os
import time

import pytest

from launch import history
from launch.control import cancel, note_start, read_log, resume_command
from launch.history import Attempt
from launch.status import details, find_runs, table
from pipeline.core.errors import LaunchError
from pipeline.record.lock import RunLock
from pipeline.record.state import State, write_state
from tests.unit.launch.test_status import beat, gone, only, run, slurm, submitted  # noqa: F401


def ended(job: str, decision: str, reason: str = "it crashed") -> Attempt:
    return Attempt(job, 0, ["n1"], history.now(), history.now(), 1, 31, decision, reason)


@pytest.mark.parametrize(
    ("queued", "phase"),
    [
        ("PENDING", "queued"),
        ("CONFIGURING", "queued"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("STOPPED", "running"),
        ("SUSPENDED", "running"),
    ],
)
def test_slurm_knows_best_while_it_has_the_job(run, slurm, queued, phase):  # noqa: F811
    submitted(run)
    (slurm / "queue").write_text(f"7 7 {queued}\n")
    for state in (State("finished", 0, 100, 0), State("failed", 1, 31, 0, "boom")):
        write_state(run, state)
        assert (only(run).phase, only(run).detail) == (phase, f"SLURM job 7 is {queued.lower()}")


def test_a_job_of_which_only_the_single_number_is_listed(run, slurm):  # noqa: F811
    submitted(run, "9")
    (slurm / "queue").write_text("7 9 PENDING\n")
    assert only(run).phase == "queued"


def test_an_attempt_that_has_only_begun_is_not_dead_for_the_silence_of_the_one_before(run):  # noqa: F811
    for rank in (0, 1):
        beat(run, rank, pid=gone())
    write_state(run, State("running", None, 20, 1))
    assert only(run).phase == "running"


def test_a_rank_of_this_machine_lives_by_its_process_and_not_by_its_words(run):  # noqa: F811
    beat(run, 0, pid=gone(), time=time.time())
    beat(run, 1, pid=gone(), time=time.time())
    assert only(run).phase == "died"
    beat(run, 1, pid=os.getpid(), time=0.0)
    assert only(run).phase == "running"


def test_a_sign_of_life_during_a_long_phase_counts(run):  # noqa: F811
    for rank in (0, 1):
        beat(run, rank, host="elsewhere", phase="checkpoint", time=time.time() - 4000)
    assert only(run).phase == "died"
    path = run / "beats" / "00001"
    first, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + json.dumps({"alive": time.time()}).encode() + b"\n")
    assert only(run).phase == "running"


def test_when_most_ranks_are_late_none_is_named(run):  # noqa: F811
    beat(run, 2, step=31, phase="data")
    beat(run, 3, step=31, phase="data")
    beat(run, 0, step=31, phase="data")
    assert only(run).behind == ""
    beat(run, 0, step=31)
    beat(run, 3, host="n3", step=31, phase="data", time=time.time() - 600)
    assert only(run).behind.startswith("rank 3 on n3 (and 1 more): in 'data' of step 31 of 31 for 10 m")


def test_requeues_of_earlier_jobs_are_not_this_one_s(run, slurm):  # noqa: F811
    submitted(run, "6")
    history.append(run, ended("6", "requeue"))
    submitted(run)
    history.append(run, ended("7", "requeue"))
    (slurm / "queue").write_text("7 7 RUNNING\n")
    assert only(run).detail == "SLURM job 7 is running; requeued 1 time"


def test_what_is_to_be_started_again_was_not_stopped(run, slurm):  # noqa: F811
    submitted(run)
    history.append(run, ended("7", "requeue", "asked to stop, and saved"))
    write_state(run, State("requeue", 75, 31, 0))
    assert only(run).stopped == ""
    history.append(run, ended("7", "stop", "somebody cancelled it"))
    assert only(run).stopped == "somebody cancelled it"


def test_a_submitted_run_can_be_looked_at_where_there_is_no_slurm(run, tmp_path, monkeypatch):  # noqa: F811
    submitted(run)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert only(run).phase == "running"


def test_errors_of_a_run_that_has_finished_are_history(run):  # noqa: F811
    (run / "logs").mkdir()
    (run / "logs" / "rank-00000.log").write_text("=== rank 0\nValueError: a picture was odd\n")
    assert list(only(run).errors) == ["ValueError: a picture was odd"]
    write_state(run, State("finished", 0, 100, 0))
    assert only(run).errors == {}


def test_many_different_errors_are_cut_short_and_many_ranks_counted(run):  # noqa: F811
    (run / "logs").mkdir()
    for rank in range(12):
        text = "peer" if rank < 6 else f"cause {rank}"
        (run / "logs" / f"rank-{rank:05d}.log").write_text(f"=== rank {rank}\nRuntimeError: {text}\n")
    write_state(run, State("failed", 1, 31, 0, "peer"))
    *_, first, second, third, fourth, last = details(only(run)).splitlines()
    assert first == "  error       ranks 0, 1, 2, 3 and 2 more: RuntimeError: peer"
    causes = [line.split("RuntimeError: ")[1] for line in (second, third, fourth)]
    assert causes == ["cause 6", "cause 7", "cause 8"]
    assert last == "  errors      3 other ones; see `sluice logs`"


def test_a_link_that_leads_back_is_not_followed(run, tmp_path):  # noqa: F811
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs")
    assert find_runs(tmp_path / "runs") == [run]


def test_a_table_says_what_slurm_says(run, slurm):  # noqa: F811
    submitted(run)
    (slurm / "queue").write_text("7 7 PENDING\n")
    assert table([only(run), only(run)]).splitlines()[1].endswith("SLURM job 7 is pending")


def test_a_job_that_has_not_begun_to_train_has_nothing_to_save(tmp_path, slurm):  # noqa: F811
    new = tmp_path / "runs" / "new"
    submitted(new)
    (slurm / "queue").write_text("7 7 RUNNING\n")
    assert cancel(new) == "SLURM job 7 is cancelled"
    assert (slurm / "said").read_text().splitlines()[-1] == "scancel 7" and not history.asked_to_end(new, "7")


def test_a_run_goes_on_from_the_folder_in_which_it_was_begun(run, slurm, tmp_path, monkeypatch):  # noqa: F811
    write_state(run, State("requeue", 75, 31, 0))
    monkeypatch.chdir("/")
    submitted(run)
    assert resume_command(run)[0] == str(tmp_path)  # as the provenance says
    facts = {"time": "2999-01-01", "folder": "/else where", "arguments": ["train"]}
    (run / "launch" / "started.json").write_text(json.dumps(facts))
    assert resume_command(run) == ("/else where", ["train"])


def test_a_log_whose_only_attempt_is_the_first_is_shown_whole(run):  # noqa: F811
    (run / "logs").mkdir()
    (run / "logs" / "rank-00000.log").write_text("=== first\na === b\nc\n")
    assert b"".join(read_log(run, 0, follow=False)) == b"=== first\na === b\nc\n"


def test_a_run_at_work_is_not_told_that_it_was_started_otherwise(run, tmp_path):  # noqa: F811
    note_start(run, ["train", "first.toml"])
    held = RunLock(run)
    held.take()
    (run / "stop").touch()
    with pytest.raises(LaunchError, match=f"in use by process {os.getpid()}"):
        note_start(run, ["train", "second.toml"])
    assert (run / "stop").exists(), "what it was asked is still asked"
    assert json.loads((run / "launch" / "started.json").read_text())["arguments"] == ["train", "first.toml"]
    held.release()
