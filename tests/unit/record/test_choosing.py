"""Rules that choose a checkpoint: what each takes, and that the target's labels change none of it."""

import pytest

from pipeline.core.errors import ConfigError
from pipeline.record.choosing import ORACLE, RULES, best_step, choices_text, choose
from pipeline.record.found import Row

SCORES = {
    "selection/source_accuracy": {10: 0.9, 20: 0.95, 30: 0.95, 40: 0.7},
    "selection/importance_weighted": {10: 0.8, 20: 0.6, 30: 0.7, 40: 0.5},
    "selection/entropy": {10: 1.2, 20: 0.9, 30: 0.4, 40: 0.6},
    "selection/snd": {10: 2.0, 20: 2.5, 30: 2.2, 40: 2.9},
    "selection/bnm": {10: 0.1, 20: 0.4, 30: 0.2, 40: float("nan")},
}
TAKEN = {"last": 40, "source_accuracy": 20, "importance_weighted": 10, "entropy": 30, "snd": 40, "bnm": 20}


def row(metric, step, value, better="higher", model=None):
    return Row(
        model=model or f"step {step}", step=step, evaluation=metric.partition("/")[0], metric=metric, split="test",
        config="", manifests={}, time="", value=value, n=100, stderr=0.01, better=better,
    )  # fmt: skip


def rows(accuracy, without=()):
    found = [row(metric, s, v) for metric, own in SCORES.items() if metric not in without for s, v in own.items()]
    return found + [row("accuracy/top1", step, value) for step, value in accuracy.items()]


TRUE = {10: 0.3, 20: 0.5, 30: 0.8, 40: 0.6}


def test_each_rule_takes_its_own_and_is_named_in_the_result():
    found = choose(rows(TRUE), "accuracy/top1")
    assert {one.rule: one.step for one in found[:-1]} == TAKEN
    assert [one.metric for one in found] == [f"accuracy/top1[{one.rule}]" for one in found]
    assert all(one.value == TRUE[one.step] for one in found)
    assert (found[-1].rule, found[-1].step) == (ORACLE, 30) and "upper bound" in ORACLE
    said = choices_text(found)
    assert all(f"accuracy/top1[{rule}]" in said for rule in [*TAKEN, ORACLE])


def test_other_labels_of_the_target_change_no_choice_but_the_upper_bound():
    first = choose(rows(TRUE), "accuracy/top1")
    flipped = choose(rows({step: 1 - value for step, value in TRUE.items()}), "accuracy/top1")
    assert [(one.rule, one.step, one.score) for one in first[:-1]] == [
        (one.rule, one.step, one.score) for one in flipped[:-1]
    ]
    assert first[-1].step != flipped[-1].step


def test_a_rule_that_was_not_measured_everywhere_does_not_choose():
    some = [one for one in rows(TRUE) if (one.metric, one.step) != ("selection/snd", 20)]
    assert {one.rule for one in choose(some, "accuracy/top1")} == {*TAKEN, ORACLE} - {"snd"}
    none = choose(rows(TRUE, without=SCORES), "accuracy/top1")
    assert [one.rule for one in none] == ["last", ORACLE]


def test_what_cannot_be_chosen_from():
    with pytest.raises(ConfigError, match=r"knn/top1 was not measured at a checkpoint; there is accuracy/top1, sel"):
        choose(rows(TRUE), "knn/top1")
    with pytest.raises(ConfigError, match=r"accuracy/top1 was measured more than once at step 20 .*folder of its own"):
        choose([*rows(TRUE), row("accuracy/top1", 20, 0.4, model="step 20, ema")], "accuracy/top1")


def test_the_best_step_of_equal_ones_is_the_first_and_no_number_is_the_worst():
    assert best_step({2: 1.0, 1: 1.0, 3: 0.5}, "higher") == 1
    assert best_step({1: float("nan"), 2: 0.1}, "higher") == 2 == best_step({1: float("nan"), 2: 0.1}, "lower")
    assert {better for _, better in RULES.values()} == {"higher", "lower"}
