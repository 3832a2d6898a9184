"""What every objective with surveys must do: the same on all ranks, at every world size and under ZeRO 3."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.core import registry
from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, Clock, Objective, StepContext
from pipeline.dist.group import process_group
from pipeline.engine.actions import Action
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.surveys import Surveyor
from pipeline.engine.watch import Watch
from pipeline.run.build import build_engine
from tests.contracts.components import CONTEXT, build_objective, make_batch, names, package_of, smoke_config, stir
from tests.ranks import start_ranks

OVERRIDDEN = [n for n in names() if registry.component(package_of(n), n, Objective).surveys is not Objective.surveys]
NAMES = [n for n in OVERRIDDEN if build_objective(n).surveys()]
"""As their smoke configs set them: a diffusion of latents looks at them once, one of pixels at nothing."""
SAMPLES, SIZE = 11, 3
ENGINES = [("accelerate", 0), ("deepspeed", 2), ("deepspeed", 3)]


class Memory:
    """A rank's part of a batch, a few rows at a time; ranks have unequal numbers of batches."""

    def __init__(self, whole: Batch, rank: int, world: int) -> None:
        ids = torch.arange(SAMPLES)[rank * SAMPLES // world : (rank + 1) * SAMPLES // world]
        self.parts = [{field: value[rows] for field, value in whole.items()} for rows in ids.split(SIZE)]
        self.batches = math.ceil(math.ceil(SAMPLES / world) / SIZE)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.parts)

    def ledger(self) -> list[dict[str, Any]]:
        return []


def state(objective: Objective) -> dict[str, NDArray[np.float64]]:
    tensors = (*objective.named_buffers(), *objective.named_parameters())
    return {name: value.detach().double().numpy().copy() for name, value in tensors}


def surveyed(name: str) -> dict[Any, Any]:
    """Buffers and parameters after all surveys, and whether it is still in training, under each engine."""
    found = {}
    with process_group(2.0) as place:
        for engine_name, stage in ENGINES:
            table = smoke_config(name).model_dump(exclude_none=True)
            zero = {"zero": stage} if engine_name == "deepspeed" else {}
            table["engine"] = {"name": engine_name, "precision": "fp32", "micro_batch": SIZE, **zero}
            table["run"]["global_batch"] = SIZE * place.world_size
            config = RunConfig.model_validate(table)
            objective = stir(build_objective(name)).train()
            whole = make_batch(objective, name, SAMPLES)
            engine = build_engine(config, objective, resolve(config, 64, place.world_size), place)
            watch = Watch(place.device, StopRequest(Path("/nonexistent")))
            surveyor = Surveyor(engine, Meter(place.device, place.world_size), watch, seed=1)
            for survey, how in objective.surveys().items():
                batch = batch_of(whole, how.data)
                surveyor.make(survey, Memory(batch, place.rank, place.world_size), CONTEXT.clock)
            with engine.whole_parameters():
                found[engine_name, stage] = (state(objective), objective.training)
    return found


def directly(name: str) -> dict[str, NDArray[np.float64]]:
    """Buffers and parameters after looks at all samples at once, in one process without any engine."""
    objective = stir(build_objective(name)).eval()
    whole = make_batch(objective, name, SAMPLES)
    ctx = StepContext(1, CONTEXT.clock, training=False)
    torch.manual_seed(1 * 1_000_003 + CONTEXT.clock.step)
    for survey, how in objective.surveys().items():
        batch = batch_of(whole, how.data)
        with torch.no_grad():
            objective.surveyed(survey, objective.look(survey, batch, ctx) | {"id": batch["id"]}, ctx)
            for own, value in objective.fresh(survey).items():
                objective.get_parameter(own).copy_(value)
    return state(objective)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_buffers_and_parameters_are_the_same_on_all_ranks_under_every_engine(name, world, lone_group):
    expected, before = directly(name), stir(build_objective(name))
    anew = {own for survey in before.surveys() for own in before.fresh(survey)}
    moved = {own for own, value in state(before).items() if not np.array_equal(expected[own], value)}
    assert moved & {own for own, _ in before.named_buffers()}
    assert moved & {own for own, _ in before.named_parameters()} <= anew
    ended = start_ranks(world, surveyed, name=name)
    assert [e.problem for e in ended] == [None] * world
    for engine in ENGINES:
        first = ended[0].value[engine][0]
        for end in ended:
            found, training = end.value[engine]
            assert training and found.keys() == expected.keys(), engine
            for key, value in expected.items():
                assert np.array_equal(found[key], first[key]), (engine, key)
                assert np.abs(found[key] - value).max() < 2e-6, (engine, key)


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (Fraction(3), [0, 3, 6, 9]),
        (Fraction(5, 2), [0, 3, 5, 8, 10]),
        (Fraction(1, 3), list(range(11))),
        (Fraction(0), []),
        (Fraction(11), [0]),
    ],
)
def test_when_a_survey_is_due(every, steps):
    action = Action("survey", every, lambda clock: None, at_end=False, ahead=True)
    assert [step for step in range(11) if action.due(Clock(step, step, 99), ending=step == 7)] == steps
