"""What follows when the ranks of a job have ended: done, stop, start again here, or queue the job again. Only logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launch.history import Action, Attempt
from pipeline.config.exitcodes import CONFIG, FINISHED, INCOMPLETE, NONFINITE, REQUEUE
from pipeline.record.failures import LIMIT, repeated

Queue = Literal["ours", "requeueing", "cancelled", "timeout"]
"""What SLURM does with the job: nothing; queues it again by itself; ends it because somebody cancelled it; ends it
because its time is up."""


@dataclass(frozen=True)
class Budget:
    """How often a job may go on after a crash."""

    restarts: int = 10
    """Inside an allocation, over the life of the job."""
    requeues: int = 10
    """After crashes and lost nodes; being asked to stop (preemption, time limit) is not counted."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    exit_code: int
    step: int | None
    """That it had reached or died in."""
    bad_nodes: Mapping[str, str]
    """Nodes that were lost or failed the preflight in this attempt, with the reason."""
    queue: Queue = "ours"
    has_agent: bool = True
    """Without an agent only queueing the job again ends what is left of the ranks."""
    slow_nodes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Nodes that the job is better off without, with the reason. They do not change what follows."""
    suite: bool = False
    """It was a suite of evaluations, which says by its exit code that some have failed, and does not crash of it."""


@dataclass(frozen=True)
class Decision:
    """What to do, and why."""

    action: Action
    reason: str
    exclude: tuple[str, ...] = ()


def decide(ended: Ended, before: Sequence[Attempt], budget: Budget) -> Decision:
    """What follows.

    Args:
        ended: the attempt that has just ended.
        before: the earlier attempts of this job, the oldest first.
        budget: of the job.
    """
    decision = _follows(ended, before, budget)
    if decision.action != "requeue" or not ended.slow_nodes:
        return decision
    exclude = tuple(sorted({*decision.exclude, *ended.slow_nodes}))
    return replace(decision, reason=decision.reason + _named(ended.slow_nodes), exclude=exclude)


def _follows(ended: Ended, before: Sequence[Attempt], budget: Budget) -> Decision:
    code, queue, bad = ended.exit_code, ended.queue, ended.bad_nodes
    settled: list[tuple[bool, Action, str]] = [
        (code == FINISHED, "finished", "all of it is done" if ended.suite else "the run has reached its length"),
        (queue == "cancelled", "stop", "the job was cancelled"),
        (queue == "requeueing", "requeue", "SLURM queues the job again"),
        (code == REQUEUE, "requeue", "asked to stop, and saved"),
        (code == NONFINITE, "stop", "a loss or gradient was not finite; starting again would fail again"),
        (
            ended.suite and code == INCOMPLETE,
            "stop",
            "some have failed, and said why; submitted again, it does the rest",
        ),
        (code == CONFIG and not bad, "stop", "something has to be mended; the message is in the log"),
        (_same_step(ended, before), "stop", f"failed {LIMIT} times in a row {_at(ended.step)}"),
    ]
    for holds, action, reason in settled:
        if holds:
            exclude = tuple(sorted(bad)) if action == "requeue" else ()
            return Decision(action, reason + (_named(bad) if exclude else ""), exclude)
    if queue == "timeout":
        return _within("requeue", "the time limit came before the run had saved", before, budget)
    if bad:
        return _within("requeue", "crashed" + _named(bad), before, budget, tuple(sorted(bad)))
    if not ended.has_agent:
        return _within("requeue", "the agent was killed", before, budget)
    return _within("restart", f"crashed with exit code {code} {_at(ended.step)}; all nodes are sound", before, budget)


def _within(
    action: Literal["restart", "requeue"],
    reason: str,
    before: Sequence[Attempt],
    budget: Budget,
    exclude: tuple[str, ...] = (),
) -> Decision:
    """The action, if its budget allows."""
    most = budget.restarts if action == "restart" else budget.requeues
    used = sum(a.decision == action and _crashed(a) for a in before)
    if used < most:
        return Decision(action, reason, exclude)
    return Decision("stop", f"{reason}; the budget of {most} {action}s is used up")


def _crashed(attempt: Attempt) -> bool:
    return attempt.exit_code != REQUEUE


def _same_step(ended: Ended, before: Sequence[Attempt]) -> bool:
    """Whether this crash and the last ones were all at the same step, on sound nodes."""
    last = before[max(0, len(before) - LIMIT + 1) :]
    own_fault = not ended.bad_nodes and all(_crashed(a) and not a.excluded for a in last)
    return own_fault and repeated([*(a.step for a in last), ended.step])


def _at(step: int | None) -> str:
    return "before the first step" if step is None else f"at step {step}"


def _named(bad: Mapping[str, str]) -> str:
    return "".join(f"; {node}: {why}" for node, why in sorted(bad.items()))
