"""Looks of an objective at a whole data set, with the weights of the moment.

A survey is due before an update. So a run that resumes from any checkpoint makes those that were not made yet, and with
the same weights, whether the run was killed before, in or after them: nothing is repeated and nothing is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.core.protocols import Batch, Clock, StepContext
from pipeline.engine.actions import Action
from pipeline.engine.base import BaseEngine
from pipeline.engine.meter import Meter
from pipeline.engine.watch import Watch

SECONDS = "survey_seconds"
"""In the metrics: what surveys took since the line before."""

ASKED = 8
"""Looks after which the ranks ask each other whether to stop."""


class Samples(Protocol):
    """A rank's part of a data set."""

    batches: int
    """On the rank that has the most."""

    def __iter__(self) -> Iterator[Batch]:
        """At least one batch; the last one may be smaller."""
        ...

    def ledger(self) -> list[dict[str, Any]]:
        """This rank's samples that could not be used and were replaced since the last call; plain JSON values."""
        ...


class Surveyor:
    """Makes the surveys of a run.

    Args:
        engine: of the objective.
        meter: is told what the rank does, and how long it took.
        watch: knows whether to stop.
        seed: of the run.
    """

    def __init__(self, engine: BaseEngine, meter: Meter, watch: Watch, seed: int) -> None:
        self.engine, self.meter, self.watch, self.seed = engine, meter, watch, seed
        self._ledger: list[dict[str, Any]] = []

    def ledger(self) -> list[dict[str, Any]]:
        """This rank's samples that were replaced in surveys since the last call, with the step and the survey."""
        lines, self._ledger = self._ledger, []
        return lines

    def action(self, name: str, every: Fraction, samples: Samples) -> Action:
        """A survey, for the loop's list."""
        self.meter.spend(SECONDS, 0.0)
        return Action(f"survey {name}", every, lambda clock: self.make(name, samples, clock), at_end=False, ahead=True)

    def make(self, name: str, samples: Samples, clock: Clock) -> None:
        """Look at all samples, and let the objective make something of it; on all ranks together.

        When the run is asked to stop meanwhile, it is given up, and so comes anew when the run goes on.
        """
        began = time.perf_counter()
        objective = self.engine.objective
        ctx = StepContext(self.seed, clock, training=False)
        # The same on all ranks, for what is drawn in making something of the rows; the step that follows begins anew.
        torch.manual_seed(self.seed * 1_000_003 + clock.step)
        objective.eval()
        with torch.no_grad(), self.engine.whole_parameters():
            rows = self._rows(name, samples, ctx)
            self._ledger += [{**line, "step": clock.step, "survey": name} for line in samples.ledger()]
            self.meter.at(f"survey {name}")
            if rows is not None:
                objective.surveyed(name, rows, ctx)
        if rows is not None:
            self.engine.renew(objective.fresh(name))
        objective.train()
        self.meter.spend(SECONDS, time.perf_counter() - began)

    def _rows(self, name: str, samples: Samples, ctx: StepContext) -> dict[str, Tensor] | None:
        """Of this rank's samples; None: the run is to stop."""
        found: list[dict[str, Tensor]] = []
        batch: Batch = {}
        mine = iter(samples)
        for number in range(samples.batches):
            if number % ASKED == 0 and self.watch.ask():
                return None
            self.meter.at(f"survey {name}")
            following = next(mine, None)
            batch = batch if following is None else following
            rows = self.engine.look(name, batch, ctx)
            # Under ZeRO 3 a forward is a matter of all ranks, so who has no batch left looks once more, at the last.
            if following is not None:
                found.append(rows | {"id": batch["id"].to(self.engine.place.device)})
        assert next(mine, None) is None, "more batches than were announced"
        return {key: torch.cat([rows[key] for rows in found]) for key in found[0]}
