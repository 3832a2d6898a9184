"""The order of things in a step, seen with parts that only note what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.core.errors import NonFiniteError
from pipeline.core.protocols import Clock, StepContext
from pipeline.engine import loop
from pipeline.engine.actions import Action
from pipeline.engine.stopping import StopRequest
from pipeline.engine.watch import Watch

CPU = torch.device("cpu")


class Quiet:
    """Measures nothing."""

    loss = torch.tensor(1.0)
    norm = torch.tensor(0.0)
    own = ()

    def end_update(self, phase: str, rate: float, norm: torch.Tensor) -> None:
        self.norm = norm

    def timed(self, source: Iterator[Any]) -> Iterator[Any]:
        return source

    def note(self, *what: object) -> None:
        pass

    restart = begin_step = end_step = at = note


@pytest.fixture
def fit(tmp_path, lone_group, monkeypatch):
    """Train with a norm for each step and a watch that looks late, as on a GPU."""

    def run(norms: list[float], done: list[int], stop: bool = False) -> tuple[loop.Outcome, Clock]:
        monkeypatch.setattr(loop, "accumulate", lambda engine, batches, ctx: iter(()))
        place, left = SimpleNamespace(world_size=1, rank=0), [torch.tensor(norm) for norm in norms]
        nothing = {"before_step": lambda clock: None, "after_step": lambda clock: None}
        update = {"update": lambda rate: left.pop(0), **nothing}
        engine = SimpleNamespace(objective=nn.Identity(), place=place, **update)
        engine.turns = lambda: [("", 0, engine)]
        request = StopRequest(tmp_path)
        request.reason = "SIGTERM" if stop else None
        watch = Watch(CPU, request)
        watch.lag = 1
        return loop.fit(
            engine=cast(Any, engine),
            stream=cast(Any, SimpleNamespace(batches=lambda step: iter([[]] * 99))),
            clock=Clock(0, 0, 4 * len(norms)),
            global_batch=4,
            seed=0,
            learning_rate=lambda samples, phase: 0.1,
            actions=[Action("checkpoint", 2, lambda clock: done.append(clock.step))],
            meter=cast(Any, Quiet()),
            watch=watch,
        )

    return run


@pytest.mark.parametrize(("bad", "done"), [(1, []), (2, []), (3, [2]), (4, [2]), (5, [2, 4])])
def test_nothing_is_kept_of_a_step_that_was_not_finite(fit, bad, done):
    kept: list[int] = []
    with pytest.raises(NonFiniteError, match=f"step {bad}: "):
        fit([math.nan if step == bad else 1.0 for step in range(1, 6)], kept)
    assert kept == done


def test_the_end_and_a_stop_are_kept_though_nothing_is_due(fit):
    kept: list[int] = []
    assert fit([1.0] * 3, kept) == (loop.Outcome.FINISHED, Clock(3, 12, 12)) and kept == [2, 3]
    kept.clear()
    outcome, clock = fit([1.0] * 9, kept, stop=True)
    assert outcome is loop.Outcome.STOPPED and kept == [clock.step] and clock.step <= 2


def test_what_libraries_draw_depends_on_the_step_and_on_nothing_before_it():
    """timm's patch dropout draws from torch's own generator: a resumed run has drawn otherwise before."""

    def drawn(step: int, rank: int = 1, seed: int = 3) -> float:
        torch.rand(11 + step)
        engine = SimpleNamespace(place=SimpleNamespace(world_size=2, rank=rank), before_step=id, turns=lambda: [])
        ctx = StepContext(seed, Clock(step, 4 * step, 400))
        loop._step(cast(Any, engine), [], ctx, lambda samples, phase: 0.1, cast(Any, Quiet()))
        return float(torch.rand(()))

    assert drawn(5) == drawn(5)
    assert len({drawn(5), drawn(6), drawn(5, rank=0), drawn(5, seed=4)}) == 4
