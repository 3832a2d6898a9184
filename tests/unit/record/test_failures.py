"""A run that fails at the same step again and again is not started for ever."""

from __future__ import annotations

import pytest

from pipeline.core.errors import LaunchError
from pipeline.record.beats import Pulse
from pipeline.record.failures import FILE, Failure, read_failures, refuse_repetition, remember
from pipeline.record.state import INTERRUPTED, State


def fail(folder, attempt, fault, **facts):
    remember(folder, State(**{"outcome": "failed", "exit_code": 1, "step": 0} | facts, attempt=attempt, fault=fault))


def test_three_times_the_same_step_is_refused_and_says_how_to_go_on(tmp_path):
    for attempt in range(2):
        fail(tmp_path, attempt, 7, error="rank 1: ValueError: odd")
        refuse_repetition(tmp_path, "aa")
    fail(tmp_path, 2, 7)
    with pytest.raises(LaunchError, match=r"step 7 of .* has failed 3 times in a row, last with: rank 1: ValueError"):
        refuse_repetition(tmp_path, "aa")
    with pytest.raises(LaunchError, match=rf"remove {tmp_path / FILE} and start again"):
        refuse_repetition(tmp_path, "aa")
    (tmp_path / FILE).unlink()
    refuse_repetition(tmp_path, "aa")


@pytest.mark.parametrize(("steps", "refused"), [((7, 8, 7), True), ((8, 8, 7), True), ((7, 8, 9), False)])
def test_of_two_ranks_a_step_apart_either_may_be_heard(tmp_path, steps, refused):
    for attempt, step in enumerate(steps):
        fail(tmp_path, attempt, step)
    if not refused:
        return refuse_repetition(tmp_path, "aa")
    with pytest.raises(LaunchError, match=f"step {steps[-1]} of .* has failed 3 times in a row"):
        refuse_repetition(tmp_path, "aa")


def test_progress_between_failures_is_no_repetition(tmp_path):
    for attempt, step in enumerate((7, 7, 9, 7, 7)):
        fail(tmp_path, attempt, step)
    refuse_repetition(tmp_path, "aa")


def test_what_is_not_a_failure_does_not_count(tmp_path):
    for attempt in range(3):
        fail(tmp_path, attempt, 7, outcome="requeue", exit_code=75)
        fail(tmp_path, attempt, 7, outcome="finished", exit_code=0)
        fail(tmp_path, attempt, 7, exit_code=2)  # to be mended by the user, who then starts it again
    assert read_failures(tmp_path) == []


def test_a_killed_attempt_is_known_by_its_beats(tmp_path):
    for rank, step in enumerate((5, 6)):
        pulse = Pulse(tmp_path, rank, 4)
        pulse.at("step", step)
        pulse.close()
    remember(tmp_path, State("running", None, 3, 4))
    assert read_failures(tmp_path) == [Failure(4, 6, None, None, None)]


def test_an_attempt_that_died_before_it_said_anything_failed_where_it_began(tmp_path):
    pulse = Pulse(tmp_path, 0, 3)
    pulse.at("step", 9)  # of the attempt before
    pulse.close()
    remember(tmp_path, State("running", None, 6, 4))
    assert read_failures(tmp_path) == [Failure(4, 6, None, None, None)]


def test_an_attempt_is_counted_once(tmp_path):
    for _ in range(3):
        fail(tmp_path, 0, 7)
    assert len(read_failures(tmp_path)) == 1


def test_what_a_person_ended_has_not_failed(tmp_path):
    remember(tmp_path, State("failed", 1, 6, 4, INTERRUPTED))
    assert read_failures(tmp_path) == []


def test_a_mended_configuration_is_tried_again(tmp_path):
    for number in range(3):
        remember(tmp_path, State("failed", 1, 6, number, "odd", fault=7, config="aa"))
    with pytest.raises(LaunchError, match="failed 3 times"):
        refuse_repetition(tmp_path, "aa")
    refuse_repetition(tmp_path, "bb")
    remember(tmp_path, State("failed", 1, 6, 3, "odd", fault=7, config="bb"))
    refuse_repetition(tmp_path, "bb")  # one failure, and two of another configuration
