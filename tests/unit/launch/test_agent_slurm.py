"""What the agent asks SLURM for when a job goes on, also while SLURM is ending it; and the shapes of what it starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from datetime import datetime, timedelta

import pytest

from launch import history
from launch.agent import port_of
from launch.history import Attempt
from pipeline.record.lock import RunLock
from tests.unit.launch.test_agent import Place, ends, place  # noqa: F401


def before(place: Place, name: str, shell: str) -> None:  # noqa: F811
    """Have a command do this first."""
    command, kept = place.folder / "bin" / name, place.folder / "kept"
    kept.mkdir(exist_ok=True)
    command.rename(kept / name)
    command.write_text(f'#!/bin/sh\ncd {place.folder}\n{shell}\nexec {kept / name} "$@"\n')
    command.chmod(0o755)


def attempt(job: str, excluded: list[str]) -> Attempt:
    return Attempt(job, 0, ["n1", "n2"], "a", "b", 137, 2, "requeue", "crashed", excluded)


def test_a_folder_in_use_is_left_as_it_is(place):  # noqa: F811
    held = RunLock(place.run)
    held.take()
    (place.run / "stop").touch()
    assert place.agent(ends(0)) == 2
    assert f"in use by process {os.getpid()}" in place.said and (place.run / "stop").exists()
    assert not place.calls("srun")
    held.release()


def test_nodes_that_any_start_of_the_job_has_excluded_stay_so(place, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    history.append(place.run, attempt("6", ["n9"]))  # another job's
    history.append(place.run, attempt("7", ["n3"]))
    place.tell(nodes="n1 allocated\nn2 down*", job="JobState=RUNNING Reason=None Restarts=1")
    assert place.agent(ends(137, 4)) == 1
    assert [a.restart for a in history.attempts(place.run)] == [0, 0, 1]
    assert len(place.calls("scontrol", "requeue")) == 1
    assert place.calls("scontrol", "update")[0][-1] == "ExcNodeList=n2,n3"


def test_a_start_that_cannot_be_soon_is_said(place):  # noqa: F811
    before(place, "scontrol", '[ "$1" != update ] || { echo no right >&2; exit 1; }')
    assert place.agent(ends(75)) == 75
    assert "no right; it starts again in two minutes" in place.said and "Traceback" not in place.said


def test_a_controller_that_is_away_is_asked_again(place):  # noqa: F811
    before(place, "scontrol", '[ "$1" != requeue ] || [ -e away ] || { touch away; exit 1; }')
    assert place.agent(ends(75)) == 75
    assert len(place.calls("scontrol", "requeue")) == 1, "the second time"


DIES = 'echo "$1" >>asked; [ -e killed ] || { touch killed; kill -TERM $$ $PPID; }'
"""What SLURM ends a job with reaches the command that has asked for it."""


def test_a_requeue_is_not_ended_by_what_it_asks_for(place):  # noqa: F811
    before(place, "scontrol", f'[ "$1" != requeue ] || {{ {DIES}; }}')
    assert place.agent(ends(75)) == 75
    assert (place.folder / "asked").read_text() == "requeue\n", "once is enough"
    assert len(place.calls("scontrol", "update")) == 1
    assert not (place.run / "stop").exists(), "nothing is left to be asked to stop"


def test_a_cancellation_is_not_ended_by_what_it_asks_for(place):  # noqa: F811
    before(place, "scancel", DIES)
    history.ask_to_end(place.run, "7")
    assert place.agent(ends(75, wait=True)) == 75
    assert (place.folder / "asked").read_text() == "7\n"


@pytest.mark.parametrize(("stop_seconds", "asked"), [(7200, True), (60, False)])
def test_saving_begins_before_the_time_limit(place, stop_seconds, asked):  # noqa: F811
    place.tell(end=(datetime.now() + timedelta(hours=1)).isoformat(timespec="seconds"))
    end = ends(75, wait=True) if asked else ends(0)
    assert place.agent(end, stop_seconds=stop_seconds) == end["code"]
    assert ("the time limit is near" in place.said) == asked


def test_one_task_for_each_rank_of_each_node(place, monkeypatch):  # noqa: F811
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert place.agent(ends(0), ranks_per_node=64) == 0
    (step,) = place.calls("srun")
    assert {"--nodes=2", "--ntasks=128", "--ntasks-per-node=64"} <= set(step)
    assert {"--kill-on-bad-exit=1", "--wait=60"} <= set(step), "one that hangs is not waited for when another has died"
    told = json.loads((place.folder / "environment").read_text())
    assert told["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 64))
    assert told["MASTER_ADDR"] == socket.gethostname()  # other nodes must reach it
    assert "NCCL_SOCKET_IFNAME" not in told or told["NCCL_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]


def test_a_task_of_an_array_has_a_folder_and_arguments_of_its_own(place, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    words = ["-m", "launch", "prep", "build", "list-{task}.csv"]
    assert place.agent(ends(0), kind="prepare", run=f"{place.folder}/part-{{task}}", arguments=words) == 0
    assert place.calls("srun")[0][-1] == "list-3.csv"
    assert [a.decision for a in history.attempts(place.folder / "part-3")] == ["finished"]


def test_an_attempt_has_come_as_far_as_its_furthest_rank(place):  # noqa: F811
    beat = {"rank": 1, "host": "n2", "pid": 1, "attempt": 0, "step": 9, "phase": "step", "time": time.time()}
    (place.folder / "beat").write_text(json.dumps(beat) + "\n" + json.dumps({"alive": None}) + "\n")
    before(place, "srun", f"mkdir -p {place.run}/beats; cp beat {place.run}/beats/00001")
    assert place.agent(ends(0, 8)) == 0
    assert [a.step for a in history.attempts(place.run)] == [9]


def test_ports_are_those_that_linux_does_not_give_out():
    assert all(1024 < port_of(job) < 32_768 for job in (1, 4_321, 12_345_678))


def test_a_job_trains_though_nobody_can_say_when_its_time_is_up(place):  # noqa: F811
    before(place, "squeue", "echo Socket timed out >&2; exit 1")
    assert place.agent(ends(0)) == 0
    assert "Socket timed out" in place.said and "waiting for SLURM's signal" in place.said


def test_a_stop_file_that_cannot_be_written_yet_is_written_later(place):  # noqa: F811
    process, away = place.start(ends(75, wait=True)), place.folder / "away"
    while not (place.folder / "waiting").exists():
        time.sleep(0.02)
    place.run.rename(away)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    away.rename(place.run)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and said.count("asked to stop (SIGUSR1)") == 1, said


SIGNALLED = """
import os, signal, sys
from launch import agent
me, wait = os.getpid(), os.waitpid
def wait_and_be_signalled(child, options):
    found = wait(child, options)
    if os.getpid() == me:
        os.kill(me, signal.SIGTERM)
    return found
os.waitpid = wait_and_be_signalled
sys.exit(agent.main(sys.argv[1:]))
"""


def test_a_signal_that_comes_when_all_is_over_changes_nothing(place):  # noqa: F811
    """As when SLURM ends the job that the agent has just had cancelled, or queued again."""
    process = place.start(ends(75), program=("-c", SIGNALLED))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "Traceback" not in said, said
