"""What `sluice status` believes when its sources disagree: SLURM, the run's state, its ranks, and its jobs' history."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from launch import history, status
from launch.control import cancel, read_log
from launch.history import Attempt
from launch.status import details, find_runs, read_status, table
from pipeline.core.errors import LaunchError
from pipeline.record import lock
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
    (slurm / "queue").write_text(f"7 7 7 {queued}\n")
    for state in (State("finished", 0, 100, 0), State("failed", 1, 31, 0, "boom")):
        write_state(run, state)
        assert (only(run).phase, only(run).detail) == (phase, f"SLURM job 7 is {queued.lower()}")


def test_a_job_of_which_only_the_single_number_is_listed(run, slurm):  # noqa: F811
    submitted(run, "9")
    (slurm / "queue").write_text("7 9 7_0 PENDING\n")
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
    (slurm / "queue").write_text("7 7 7 RUNNING\n")
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
    (slurm / "queue").write_text("7 7 7 PENDING\n")
    assert table([only(run), only(run)]).splitlines()[1].endswith("SLURM job 7 is pending")


def test_a_job_that_has_not_begun_to_train_has_nothing_to_save(tmp_path, slurm):  # noqa: F811
    new = tmp_path / "runs" / "new"
    submitted(new)
    (slurm / "queue").write_text("7 7 7 RUNNING\n")
    assert cancel(new) == "SLURM job 7 is cancelled"
    assert (slurm / "said").read_text().splitlines()[-1] == "scancel 7" and not history.asked_to_end(new, "7")


def test_a_log_whose_only_attempt_is_the_first_is_shown_whole(run):  # noqa: F811
    (run / "logs").mkdir()
    (run / "logs" / "rank-00000.log").write_text("=== first\na === b\nc\n")
    assert b"".join(read_log(run, 0, follow=False)) == b"=== first\na === b\nc\n"


def test_a_link_to_a_run_is_a_run(run, tmp_path):  # noqa: F811
    elsewhere = tmp_path / "scratch" / "big"
    elsewhere.parent.mkdir()
    run.rename(elsewhere)
    run.symlink_to(elsewhere)
    assert find_runs(tmp_path / "runs") == [run]


def test_one_bad_folder_does_not_hide_the_others(run, tmp_path, slurm, capsys, monkeypatch):  # noqa: F811
    bad = tmp_path / "runs" / "bad"
    shutil.copytree(run, bad)
    (bad / "provenance.json").write_text('{"plan": 7}')
    submitted(run)
    (slurm / "squeue").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    closed = tmp_path / "runs" / "closed"
    closed.mkdir()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: deny(path) if Path(path) == closed else scan(path))
    assert find_runs(tmp_path / "runs") == [bad, run]
    lines = table(read_status([bad, run])).splitlines()
    assert "unreadable" in lines[1] and "running" in lines[2]
    said = capsys.readouterr().err
    assert f"passed over {closed}: Permission denied" in said and "no controller" in said
    with pytest.raises(LaunchError, match=f"cannot read what {bad} says"):
        read_status([bad])


def deny(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_folder_of_runs_may_be_named(run, capsys):  # noqa: F811
    status.show([run.parent], watch=False)
    assert capsys.readouterr().out.startswith(f"{run}: running")
    with pytest.raises(LaunchError, match="no such is no run folder"):
        status.show([run.parent / "no such"], watch=False)


def test_a_copy_of_a_run_at_work_is_not_at_work(run):  # noqa: F811
    held = RunLock(run)
    held.take()
    copy = run.with_name("two")
    shutil.copytree(run, copy)
    assert (only(run).phase, only(copy).phase) == ("running", "died")
    held.release()


def test_a_process_that_has_only_the_number_is_not_the_run(run):  # noqa: F811
    for rank in (0, 1):
        beat(run, rank, born="1")
    assert only(run).phase == "died"
    for rank in (0, 1):
        beat(run, rank, boot="another")
    assert only(run).phase == "running", "a machine of which only the clock is known"


@pytest.mark.parametrize("ahead", [300.0, -300.0])
@pytest.mark.parametrize("moves", [True, False])
def test_a_clock_that_is_wrong_kills_no_run(run, ahead, moves, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lock, "RENEWED", 0.2)
    held = RunLock(run)
    held.take()
    for rank in (0, 1):
        beat(run, rank, boot="another machine", time=time.time() - ahead)
    over = threading.Event()
    thread = threading.Thread(target=lambda: [held.renew() for _ in range(1000) if moves and not over.wait(0.02)])
    thread.start()
    phase = only(run).phase
    over.set()
    thread.join()
    held.release()
    assert phase == ("running" if moves or ahead < 0 else "died")
