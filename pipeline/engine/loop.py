"""The loop. There is one, and it is closed to inheritance: what varies is an objective, an engine or an action."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.core.protocols import Clock, StepContext, Stream
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
    learning_rate: Callable[[int], float],
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
        learning_rate: of an update, from the samples seen before it.
        actions: run in this order when due; on stopping, those that are due at the end.
        meter: takes in every step; the log action reads it.
        watch: the ranks' agreement on going on, asked after every update.

    Raises:
        NonFiniteError: on every rank in the same step.
        CheckpointError: the same, when one could not be written.
    """
    if clock.samples >= clock.total_samples:
        return Outcome.FINISHED, clock
    engine.objective.train()
    meter.restart()
    for micro_batches in meter.timed(stream.batches(clock.step)):
        meter.begin_step(clock.step + 1)
        # What libraries draw by themselves (timm's patch dropout) begins anew in each step: resuming needs no state.
        torch.manual_seed((seed * 1_000_003 + clock.step) * engine.place.world_size + engine.place.rank)
        ctx = StepContext(seed, clock)
        engine.before_step(clock)
        for output, batch in accumulate(engine, micro_batches, ctx):
            meter.add(output, batch)
        norm = engine.update(learning_rate(clock.samples))
        clock = replace(clock, step=clock.step + 1, samples=clock.samples + global_batch)
        engine.after_step(clock)
        meter.end_step(norm, global_batch)
        watch.exchange(clock.step, meter.loss, norm)

        ending = watch.stopping or clock.samples >= clock.total_samples
        due = [action for action in actions if action.due(clock, ending=ending)]
        if due or ending:
            watch.settle()
        for action in due:
            meter.at(action.name)
            action.run(clock)
        if clock.samples >= clock.total_samples:
            return Outcome.FINISHED, clock
        if ending:
            return Outcome.STOPPED, clock
    raise AssertionError("the stream has ended, but streams are endless")
