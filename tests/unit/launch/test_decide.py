"""What follows when the ranks of a job have ended, for any history."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.decide import Budget, Ended, decide
from launch.history import Attempt

CODES = st.sampled_from([0, 1, 2, 70, 75, 137])
STEPS = st.none() | st.integers(0, 3)
BAD = st.dictionaries(st.sampled_from(["n1", "n2"]), st.just("is down"), max_size=2)
QUEUES = st.sampled_from(["ours", "requeueing", "cancelled", "timeout"])
ENDINGS = st.builds(Ended, CODES, STEPS, BAD, QUEUES)


def after(ended: Ended, decision: str, excluded: tuple[str, ...] = ()) -> Attempt:
    return Attempt("7", 0, ["n1", "n2"], "", "", ended.exit_code, ended.step, decision, "", excluded)


def play(endings: list[Ended], budget: Budget) -> list[Attempt]:
    """The attempts of a job that ends like this each time it is started, as far as it is started."""
    history: list[Attempt] = []
    for ended in endings:
        made = decide(ended, history, budget)
        history.append(after(ended, made.action, made.exclude))
        if made.action in ("finished", "stop"):
            break
    return history


@pytest.mark.parametrize(
    ("ended", "action"),
    [
        (Ended(0, 9, {}), "finished"),
        (Ended(2, None, {}), "stop"),
        (Ended(70, 4, {}), "stop"),
        (Ended(75, 4, {}), "requeue"),
        (Ended(75, 4, {}, "timeout"), "requeue"),
        (Ended(75, 4, {}, "cancelled"), "stop"),
        (Ended(137, 4, {}, "cancelled"), "stop"),
        (Ended(137, 4, {}, "requeueing"), "requeue"),
        (Ended(137, 4, {}, "timeout"), "requeue"),
        (Ended(1, 4, {}), "restart"),
        (Ended(137, None, {}), "restart"),
        (Ended(1, 4, {"n2": "is down"}), "requeue"),
        (Ended(2, None, {"n2": "has no device"}), "requeue"),
        (Ended(1, None, {}, suite=True), "stop"),
        (Ended(1, None, {}, "requeueing", suite=True), "requeue"),
        (Ended(137, None, {}, suite=True), "restart"),
    ],
)
def test_first_attempt(ended, action):
    assert decide(ended, [], Budget()).action == action


@given(st.lists(ENDINGS, max_size=40), st.integers(0, 3), st.integers(0, 3))
def test_crashes_end_within_the_budget_and_bad_nodes_are_always_left_out(endings, restarts, requeues):
    history = play(endings, Budget(restarts, requeues))
    assert sum(a.decision == "restart" for a in history) <= restarts
    by_us = [a for a, e in zip(history, endings, strict=False) if e.queue != "requeueing" and a.exit_code != 75]
    assert sum(a.decision == "requeue" for a in by_us) <= requeues
    for attempt, ended in zip(history, endings, strict=False):
        if attempt.decision == "requeue":
            assert set(attempt.excluded) == (
                set() if ended.queue == "timeout" and attempt.exit_code != 75 else set(ended.bad_nodes)
            )
        if attempt.decision == "restart":
            assert not ended.bad_nodes and ended.queue == "ours"


@given(st.lists(ENDINGS, max_size=40))
def test_what_has_finished_is_never_started_again_and_what_was_saved_always_is(endings):
    for attempt, ended in zip(play(endings, Budget()), endings, strict=False):
        assert (attempt.decision == "finished") == (ended.exit_code == 0)
        if ended.exit_code == 75 and ended.queue != "cancelled":
            assert attempt.decision == "requeue"


@pytest.mark.parametrize("step", [None, 0, 7])
def test_the_same_step_three_times_stops(step):
    history = play([Ended(1, step, {})] * 10, Budget(100, 100))
    assert [a.decision for a in history] == ["restart", "restart", "stop"]


@pytest.mark.parametrize(
    ("steps", "stops"),
    [
        ((5, 6, 5), True),
        ((6, 5, 5), True),
        ((0, 1, 1), True),
        ((5, 6, 7), False),
        ((7, 5, 6), False),
        ((0, None, 0), False),
        ((None, None, 0), False),
    ],
)
def test_steps_next_to_each_other_are_the_same(steps, stops):
    """Which of two ranks, a step apart, was heard last is chance."""
    history = play([Ended(1, step, {}) for step in steps], Budget(100, 100))
    assert [a.decision for a in history] == ["restart", "restart", "stop" if stops else "restart"]


@pytest.mark.parametrize(
    "between",
    [Ended(1, 9, {}), Ended(75, 7, {}), Ended(1, 7, {"n1": "is down"})],
    ids=["another step", "a save", "a bad node"],
)
def test_other_ends_between_them_begin_the_count_anew(between):
    crash = Ended(1, 7, {})
    history = play([crash, crash, between, crash, crash, crash, crash], Budget(100, 100))
    assert [a.decision for a in history][2:] == [decide(between, [], Budget()).action, "restart", "restart", "stop"]


def test_without_an_agent_the_job_is_queued_again_within_the_budget():
    history = play([Ended(1, n, {}, has_agent=False) for n in range(0, 20, 2)], Budget(9, 2))
    assert [a.decision for a in history] == ["requeue", "requeue", "stop"]
    cancelled = Ended(1, 4, {}, "cancelled", has_agent=False)
    assert decide(cancelled, [], Budget()).action == "stop"


def test_being_preempted_for_ever_costs_nothing():
    history = play([Ended(75, step, {}) for step in range(100)], Budget(0, 0))
    assert {a.decision for a in history} == {"requeue"}


def test_a_stop_says_why():
    made = decide(Ended(1, 7, {}), [after(Ended(1, 7, {}), "restart")] * 2, Budget())
    assert made.action == "stop" and made.reason == "failed 3 times in a row at step 7"
    made = decide(Ended(1, None, {"n2": "is down"}), [], Budget(requeues=0))
    assert made.reason == "crashed; n2: is down; the budget of 0 requeues is used up"
    assert asdict(made)["exclude"] == ()


@given(ENDINGS, st.dictionaries(st.sampled_from(["n1", "n3"]), st.just("is slow"), min_size=1))
def test_slow_nodes_are_left_out_when_the_job_is_queued_again_and_change_nothing_else(ended, slow):
    usual, made = decide(ended, [], Budget()), decide(replace(ended, slow_nodes=slow), [], Budget())
    assert made.action == usual.action
    queued = usual.action == "requeue"
    assert set(made.exclude) == set(usual.exclude) | (set(slow) if queued else set())
    assert ("is slow" in made.reason) == queued
