"""Talking to SLURM: what it says is understood, and its silence is waited out."""

from __future__ import annotations

import pytest

from launch import slurm
from launch.slurm import Facts, queue_of
from pipeline.core.errors import LaunchError


@pytest.mark.parametrize(
    ("said", "queue"),
    [
        (Facts("RUNNING", "None", 1), "ours"),
        (Facts("COMPLETING", "None", 2), "requeueing"),
        (Facts("COMPLETING", "TimeLimit", 1), "timeout"),
        (Facts("COMPLETING", "None", 1), "cancelled"),
        (Facts("CANCELLED", "None", 1), "cancelled"),
    ],
)
def test_what_slurm_does_with_a_job_that_was_restarted_once(said, queue):
    assert queue_of(said, 1) == queue


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:05", 5405),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("2-12:30:01", 217_801),
        ("infinite", None),
    ],
)
def test_time_limits_as_sbatch_reads_them(limit, seconds):
    assert slurm.limit_seconds(limit) == seconds


@pytest.mark.parametrize("limit", ["", "1h", "-1", "1:2:3:4", "1-", "1-2:3:4:5", "12:00 "])
def test_time_limits_that_sbatch_does_not_take(limit):
    with pytest.raises(LaunchError, match="write it like"):
        slurm.limit_seconds(limit)


def test_a_job_whose_name_pretends_is_not_believed(monkeypatch):
    line = "JobId=7 JobName=xJobState=PENDING UserId=a JobState=RUNNING Reason=None Restarts=2 Command=/x Restarts=9"
    monkeypatch.setattr(slurm, "call", lambda *command: line)
    assert slurm.facts("7") == Facts("RUNNING", "None", 2)


@pytest.mark.parametrize(
    ("nodes", "silent", "bad"),
    [
        ("n1 allocated\nn2 mixed", [], {}),
        ("n1 allocated\nn2 down*", [], {"n2": "is down*"}),
        ("n1 allocated\nn2 draining", [], {"n2": "is draining"}),
        ("n1 allocated\nn2 allocated*", [], {"n2": "is allocated*"}),
        ("n1 allocated\nn2 allocated", ["n2"], {"n2": "cannot run `true`"}),
        ("n1 allocated\nn2 allocated", ["n1", "n2"], {}),
    ],
)
def test_unsound_nodes(monkeypatch, nodes, silent, bad):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)

    def call(*command: str, **more: object) -> str:
        if command[0] == "srun" and any(node in word for node in silent for word in command):
            raise LaunchError("no answer")
        return nodes

    monkeypatch.setattr(slurm, "call", call)
    assert slurm.unsound(["n1", "n2"], alive=True) == bad
    assert slurm.unsound(["n1", "n2"], alive=False) == {n: why for n, why in bad.items() if why.startswith("is")}


def test_where_there_are_gpus_a_node_that_has_lost_one_is_unsound(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")

    def call(*command: str, **more: object) -> str:
        if command[0] == "srun" and command[-1] == "nvidia-smi" and any("n2" in word for word in command):
            raise LaunchError("Unable to determine the device handle for GPU: GPU is lost")
        return "n1 allocated\nn2 allocated"

    monkeypatch.setattr(slurm, "call", call)
    assert slurm.unsound(["n1", "n2"], alive=True) == {"n2": "cannot run `nvidia-smi`"}


def test_a_controller_that_comes_back_was_never_away(monkeypatch):
    monkeypatch.setattr(slurm, "RETRY_SECONDS", (0.0, 0.0))
    answers = [LaunchError("away"), LaunchError("away"), None]

    def ask() -> str:
        if (answer := answers.pop(0)) is not None:
            raise answer
        return "here"

    assert slurm.patiently(ask) == "here"
    answers += [LaunchError("away")] * 3
    with pytest.raises(LaunchError, match="away"):
        slurm.patiently(ask)
