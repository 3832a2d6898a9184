"""Nodes that stayed slow: left out where the profile wants it, and where enough others are there."""

from __future__ import annotations

import pytest

from launch import history
from pipeline.record.paces import Paces, Slow
from tests.unit.launch.test_agent import Place, ends, place  # noqa: F401

THREE = "n1 allocated\nn2 allocated\nn3 idle"


@pytest.fixture(autouse=True)
def in_a_partition(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")


def slow(place: Place, *nodes: str, attempt: int = 0) -> None:  # noqa: F811
    """The later a node is named, the slower it is."""
    named = [Slow(rank, node, 50.0 + rank, "step", 3) for rank, node in enumerate(nodes)]
    Paces(attempt, 4, 1.0, ["n1", "n2"], [[0.0, 1.0, 0.0, 0.0]] * 2, named).write(place.run)


def left_out(place: Place, **values) -> list[str]:  # noqa: F811
    """After a run that was asked to stop: what SLURM is told to leave out."""
    assert place.agent(ends(75), **values) == 75
    (update,) = place.calls("scontrol", "update")
    told = [word.removeprefix("ExcNodeList=") for word in update if word.startswith("ExcNodeList=")]
    (attempt,) = history.attempts(place.run)
    assert list(attempt.excluded) == (told[0].split(",") if told else [])
    return list(attempt.excluded)


def test_only_where_the_profile_says_so(place):  # noqa: F811
    slow(place, "n2")
    place.tell(nodes=THREE)
    assert left_out(place) == []
    assert not place.calls("sinfo")


def test_a_slow_node_is_left_out(place):  # noqa: F811
    slow(place, "n2")
    place.tell(nodes=THREE)
    assert left_out(place, leave_out_slow=True) == ["n2"]
    assert 'n2: rank 0 is 50 % slower, mostly in "step"' in place.said
    assert "--partition=gpu" in place.calls("sinfo")[0]


@pytest.mark.parametrize("nodes", ["n1 allocated\nn2 allocated", "n1 allocated\nn2 allocated\nn3 down*\nn4 drained"])
def test_the_last_nodes_are_kept(place, nodes):  # noqa: F811
    slow(place, "n2")
    place.tell(nodes=nodes)
    assert left_out(place, leave_out_slow=True) == []
    assert "of the slow nodes (n2) 0 can be left out" in place.said


def test_of_more_than_can_be_spared_the_slowest_is_left_out(place):  # noqa: F811
    slow(place, "n2", "n1")
    place.tell(nodes=THREE)
    assert left_out(place, leave_out_slow=True) == ["n1"]


def test_what_is_left_out_already_is_not_counted_as_there(place):  # noqa: F811
    before = history.Attempt("7", 0, ["n1", "n2"], "a", "b", 137, 2, "requeue", "crashed", ["n3"])
    history.append(place.run, before)
    slow(place, "n2")
    place.tell(nodes=THREE)
    assert place.agent(ends(75), leave_out_slow=True) == 75
    assert place.calls("scontrol", "update")[0][-1] == "ExcNodeList=n3"


def test_words_of_an_earlier_attempt_and_of_other_nodes_are_old(place):  # noqa: F811
    slow(place, "n2", attempt=3)
    place.tell(nodes=THREE)
    assert left_out(place, leave_out_slow=True) == []


def test_a_crash_on_slow_nodes_starts_again_here(place):  # noqa: F811
    slow(place, "n2")
    place.tell(nodes=THREE)
    assert place.agent(ends(1), ends(0, 12, attempt=1), leave_out_slow=True) == 0
    assert place.decisions == ["restart", "finished"] and not place.calls("scontrol", "update")
