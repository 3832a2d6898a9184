"""Which checkpoint of an adapted run is taken, by rules that never see a label of the target, and what it then reaches.

A rule is a metric that was measured at every checkpoint (see the evaluation ``selection``), or "last". What the best
checkpoint by the labels themselves would reach is no choice but an upper bound, and is called so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pipeline.core.errors import ConfigError
from pipeline.record.found import Row

LAST, ORACLE = "last", "oracle (upper bound)"
RULES: Mapping[str, tuple[str, Literal["higher", "lower"]]] = {
    "source_accuracy": ("selection/source_accuracy", "higher"),
    "importance_weighted": ("selection/importance_weighted", "higher"),
    "entropy": ("selection/entropy", "lower"),
    "snd": ("selection/snd", "higher"),
    "bnm": ("selection/bnm", "higher"),
}
"""Rule to its metric and which way is good."""


class Choice(NamedTuple):
    """What a rule takes."""

    rule: str
    step: int
    score: float
    """Of the rule, at that step; of "last" the step itself."""
    value: float
    """Of the metric that is reported, at that step."""
    stderr: float | None
    metric: str
    """Named by the rule: "accuracy/top1[snd]"."""


def choose(rows: Sequence[Row], metric: str) -> list[Choice]:
    """What each rule takes of a run's checkpoints, "last" first and the upper bound at the end.

    Of equal scores the earlier step is taken. A rule whose metric was not measured at every checkpoint that ``metric``
    was measured at is left out, since it would choose among others.

    Args:
        rows: results of one run.
        metric: what is reported.

    Raises:
        ConfigError: it was not measured at a checkpoint, or several times at one.
    """
    reported = _by_step(rows, metric)
    if not reported:
        known = sorted({row.metric for row in rows if row.step is not None})
        raise ConfigError(f"{metric} was not measured at a checkpoint; there is {', '.join(known) or 'nothing'}")
    last = max(reported)
    found = [_choice(LAST, last, float(last), reported[last], metric)]
    for rule, (score, better) in RULES.items():
        scores = {step: row.value for step, row in _by_step(rows, score).items() if step in reported}
        if scores.keys() == reported.keys():
            step = best_step(scores, better)
            found.append(_choice(rule, step, scores[step], reported[step], metric))
    better = "lower" if reported[last].better == "lower" else "higher"
    step = best_step({step: row.value for step, row in reported.items()}, better)
    return [*found, _choice(ORACLE, step, reported[step].value, reported[step], metric)]


def best_step(values: Mapping[int, float], better: Literal["higher", "lower"]) -> int:
    """The step of the best value, of equal ones the first; one that is not a number is the worst."""
    sign = 1 if better == "lower" else -1
    return min(sorted(values), key=lambda step: math.inf if math.isnan(values[step]) else sign * values[step])


def choices_text(choices: Sequence[Choice]) -> str:
    """A line for each rule."""
    lines = [f"{'result':<44} {'step':>8} {'score':>10} {'value':>8}  error"]
    for one in choices:
        error = "" if one.stderr is None else f"+- {one.stderr:.4f}"
        lines.append(f"{one.metric:<44} {one.step:>8} {one.score:>10.4f} {one.value:>8.4f}  {error}")
    return "\n".join(lines)


def _choice(rule: str, step: int, score: float, row: Row, metric: str) -> Choice:
    return Choice(rule, step, score, row.value, row.stderr, f"{metric}[{rule}]")


def _by_step(rows: Sequence[Row], metric: str) -> dict[int, Row]:
    """Of the checkpoints themselves.

    Raises:
        ConfigError: the metric was measured in several ways at one.
    """
    found: dict[int, Row] = {}
    for row in rows:
        if row.metric != metric or row.step is None:
            continue
        if row.step in found:
            raise ConfigError(
                f"{metric} was measured more than once at step {row.step} ({found[row.step].model}, {row.model}; "
                f"{found[row.step].split}, {row.split}): evaluate the run alone into a folder of its own"
            )
        found[row.step] = row
    return found
