"""The loop. There is one, and it is closed to inheritance: what varies is an objective, an engine or an action."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.core.protocols import Batch, Clock, StepContext, Stream
from pipeline.engine.accumulate import accumulate
from pipeline.engine.actions import Action
from pipeline.engine.base import BaseEngine
from pipeline.engine.meter import Meter
from pipeline.engine.watch import Watch


class Outcome(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    """Asked to; go on later."""


def fit(
    *,
    engine: BaseEngine,
    stream: Stream,
    clock: Clock,
    global_batch: int,
    seed: int,
    learning_rate: Callable[[int, str], float],
    actions: Sequence[Action],
    meter: Meter,
    watch: Watch,
) -> tuple[Outcome, Clock]:
    """Train from ``clock`` to the end of the run, or until asked to stop.

    Args:
        engine: forward, backward, update.
        stream: batches from the clock's step on.
        clock: where the run is.
        global_batch: samples per update, over all ranks.
        seed: of the run.
        learning_rate: of an update, from the samples seen before it and its phase.
        actions: run in this order when due, some before an update and the others after it; on stopping, those that
            are due at the end.
        meter: takes in every step; the log action reads it.
        watch: the ranks' agreement on going on, asked after every update.

    Raises:
        NonFiniteError: on every rank in the same step.
        CheckpointError: the same, when one could not be written.
    """
    if clock.samples >= clock.total_samples:
        return Outcome.FINISHED, clock
    first = clock.step
    engine.objective.train()
    meter.restart()
    for micro_batches in meter.timed(stream.batches(clock.step)):
        _run([action for action in actions if action.ahead and action.due(clock, ending=False)], clock, meter)
        if watch.stopping:  # asked to in one of these, which was given up
            watch.settle()
            if clock.step > first:
                _run([a for a in actions if not a.ahead and a.at_end and not a.due(clock, ending=False)], clock, meter)
            return Outcome.STOPPED, clock
        _step(engine, micro_batches, StepContext(seed, clock), learning_rate, meter)
        clock = replace(clock, step=clock.step + 1, samples=clock.samples + global_batch)
        engine.after_step(clock)
        meter.end_step(global_batch)
        watch.exchange(clock.step, meter.loss, meter.norm, meter.own)

        ending = watch.stopping or clock.samples >= clock.total_samples
        due = [action for action in actions if not action.ahead and action.due(clock, ending=ending)]
        if due or ending:
            watch.settle()
        _run(due, clock, meter)
        if clock.samples >= clock.total_samples:
            return Outcome.FINISHED, clock
        if ending:
            return Outcome.STOPPED, clock
    raise AssertionError("the stream has ended, but streams are endless")


def _step(
    engine: BaseEngine,
    micro_batches: Sequence[Batch],
    ctx: StepContext,
    learning_rate: Callable[[int, str], float],
    meter: Meter,
) -> None:
    """All updates of a step: one, where the objective has no phases."""
    clock, place = ctx.clock, engine.place
    meter.begin_step(clock.step + 1)
    # What libraries draw by themselves (timm's patch dropout) begins anew in each step: resuming needs no state.
    torch.manual_seed((ctx.seed * 1_000_003 + clock.step) * place.world_size + place.rank)
    engine.before_step(clock)
    for phase, repeat, updating in engine.turns():
        for output, batch in accumulate(updating, micro_batches, replace(ctx, phase=phase, repeat=repeat)):
            meter.add(output, batch)
        rate = learning_rate(clock.samples, phase)
        meter.end_update(phase, rate, updating.update(rate))


def _run(actions: Sequence[Action], clock: Clock, meter: Meter) -> None:
    for action in actions:
        meter.at(action.name)
        action.run(clock)
