"""A supervisor among signals: which ones mean what, when they come, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from launch import supervise as supervise_module
from launch.supervise import STOP_SIGNALS, _Requests, session_members, supervise
from tests.unit.launch.test_supervise import (
    FINISHED,
    REQUEUE,
    RUNNING,
    alive,
    assert_none_left,
    environment,
    launcher,
    rank,
    started,  # noqa: F401
    wait_for,
)


def test_a_request_before_there_is_anybody_to_ask_is_kept(tmp_path):
    with subprocess.Popen(["true"]) as process:
        process.wait()
    requests = _Requests(tmp_path)
    requests(signal.SIGTERM, None)
    assert not (tmp_path / "stop").exists()
    requests.attach(process.pid)
    assert (tmp_path / "stop").exists()


def test_on_a_full_disk_the_ranks_of_this_machine_are_told_all_the_same(tmp_path):
    with subprocess.Popen(rank(tmp_path, "until_asked"), env=environment(), start_new_session=True) as process:
        wait_for((tmp_path / "ready").exists, "readiness")
        requests = _Requests(tmp_path / "no such folder")  # in which no file can be made
        requests.attach(process.pid)
        requests(signal.SIGTERM, None)
        assert process.wait(timeout=60) == 0


def test_only_a_second_interrupt_kills(tmp_path, started):  # noqa: F811
    """A scheduler may say SIGTERM more than once, and a person may interrupt after it."""
    supervisor = started(rank(tmp_path, "ignore=2", RUNNING, "until=go", REQUEUE, "leave=75"))
    for count, number in enumerate([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], start=1):
        supervisor.send_signal(number)
        said = tmp_path / "err"
        wait_for(lambda said=said, n=count: said.read_text().count("asked to stop") == n, f"answer {count}", 20)
    (tmp_path / "go").touch()
    assert supervisor.wait(timeout=60) == 75


def test_the_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert supervise(rank(tmp_path, FINISHED), tmp_path, environment()) == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_kill_of_the_whole_terminal_takes_the_ranks_along(tmp_path):
    """The guard must not be among those that are killed."""
    code = (
        "import sys, os, pathlib; from launch.supervise import supervise;"
        "supervise(sys.argv[2:], pathlib.Path(sys.argv[1]), os.environ)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *launcher(tmp_path, "ignore=1", RUNNING, "hang")]
    with subprocess.Popen(command, env=environment(), start_new_session=True) as supervisor:
        wait_for((tmp_path / "ready").exists, "readiness")
        os.killpg(supervisor.pid, signal.SIGKILL)
    assert_none_left(tmp_path)


def test_the_dead_whom_nobody_has_asked_for_are_no_members():
    with subprocess.Popen(["true"], start_new_session=True) as process:
        wait_for(lambda: not alive(process.pid), "death")
        assert session_members(process.pid) == []


def test_a_run_that_has_finished_may_take_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.supervise.LINGER_SECONDS", 0.0)
    monkeypatch.setattr("launch.supervise.WATCH_SECONDS", 0.02)
    said = 'state={"outcome": "finished", "exit_code": 0, "step": 3, "attempt": 0}'
    assert supervise(rank(tmp_path, said, "wait=0.5", "tell"), tmp_path, environment()) == 0
    assert (tmp_path / "rank-None.json").exists()


def test_the_command_has_its_folder_and_an_input_that_does_not_end(tmp_path):
    """Over ssh, the end of the input is the end of the run."""
    assert (
        supervise(rank(tmp_path, "input_goes_on", "tell", FINISHED), tmp_path, environment(), working_folder="/") == 0
    )
    assert json.loads((tmp_path / "rank-None.json").read_text())["folder"] == "/"


def test_those_who_come_while_others_are_killed_are_killed_too(monkeypatch, capfd):
    sent = []

    class Member:
        def __init__(self, pid):
            self.pid = pid

        def send(self, number):
            sent.append((self.pid, number))

    answers = [[Member(1)], [Member(1), Member(2)], []]
    monkeypatch.setattr(supervise_module, "session_members", lambda session: answers.pop(0))
    supervise_module.kill_session(9)
    assert sent == [(1, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGKILL)]
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(supervise_module, "KILL_SECONDS", 0.0)
    monkeypatch.setattr(supervise_module, "session_members", lambda session: [Member(3)])
    supervise_module.kill_session(9)
    assert "processes 3 do not die" in capfd.readouterr().err


@pytest.mark.parametrize(("status", "code"), [(0, 1), (1, 1), (70, 70)])
def test_a_state_that_was_torn_says_nothing(tmp_path, status, code):
    """As on a full disk, where it is overwritten in place and the machine may die meanwhile."""
    torn = 'state={"outcome": "fini'
    assert supervise(rank(tmp_path, torn, f"leave={status}"), tmp_path, environment()) == code
