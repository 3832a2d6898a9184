"""Which nodes SLURM's words call unsound, when a job's time is up, and that nothing waits for a command for ever."""

from __future__ import annotations

import time

import pytest

from launch import slurm
from pipeline.core.errors import LaunchError


def test_a_command_that_does_not_answer_is_given_up():
    with pytest.raises(LaunchError, match="sleep did not answer in 0 s; is SLURM's controller up"):
        slurm.call("sleep", "60", seconds=0.1)


def test_a_refusal_is_told_in_slurms_own_words():
    with pytest.raises(LaunchError, match=r"sh refused: no such partition$"):
        slurm.call("sh", "-c", "echo no such partition; exit 1")
    with pytest.raises(LaunchError, match=r"sh refused: down$"):
        slurm.call("sh", "-c", "echo printed; echo down >&2; exit 1")


@pytest.mark.parametrize(
    "state", ["drained", "failing", "unknown", "error", "reboot^", "powering_down", "powered_down", "idle*"]
)
def test_states_in_which_a_node_is_lost(monkeypatch, state):
    monkeypatch.setattr(slurm, "call", lambda *command, **more: f"n1 allocated\nn2 {state}")
    assert slurm.unsound(["n1", "n2"], alive=False) == {"n2": f"is {state}"}


@pytest.mark.parametrize("state", ["allocated", "mixed", "idle", "completing", "reserved"])
def test_states_in_which_it_is_not(monkeypatch, state):
    monkeypatch.setattr(slurm, "call", lambda *command, **more: f"n1 {state}\nn2 {state}")
    assert slurm.unsound(["n1", "n2"], alive=False) == {}


def test_beside_a_node_that_is_down_another_may_be_silent(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)

    def call(*command: str, **more: object) -> str:
        if command[0] == "srun" and any("n3" in word for word in command):
            raise LaunchError("no answer")
        return "n1 allocated\nn2 down\nn3 allocated"

    monkeypatch.setattr(slurm, "call", call)
    assert slurm.unsound(["n1", "n2", "n3"], alive=True) == {"n2": "is down", "n3": "cannot run `true`"}


def test_the_end_of_a_job_is_known_from_its_environment_or_asked_for(monkeypatch):
    answers = {"said": "2026-01-02T03:04:05"}
    monkeypatch.setattr(slurm, "call", lambda *command: answers["said"])
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert slurm.end_time("7") == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    answers["said"] = "NONE"
    assert slurm.end_time("7") is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234567890")
    assert slurm.end_time("7") == 1234567890.0


def test_a_limit_of_0_is_none():
    assert [slurm.limit_seconds(text) for text in ("0", "UNLIMITED", "0:30")] == [None, None, 30.0]


def test_jobs_are_known_by_the_number_of_their_array_or_their_own(monkeypatch):
    monkeypatch.setattr(slurm, "call", lambda *command, seconds: "7 7 7 RUNNING sluice-a b\n8 9 8_0 PENDING other")
    jobs = {"7": "sluice-a b", "8": "", "9": "", "8_0": "", "8_1": "", "10": ""}
    assert slurm.states(jobs) == {"7": "RUNNING", "8": "PENDING", "9": "PENDING", "8_0": "PENDING"}
    assert slurm.states({"7": "sluice-another"}) == {}, "a number that was given out again"
    assert slurm.states({}) == {}


def test_waiting_for_a_controller_is_as_long_as_its_maintenance():
    assert 1500 < sum(slurm.RETRY_SECONDS) < 3600
