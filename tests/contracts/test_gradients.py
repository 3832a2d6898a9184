"""The gradient is the same at every world size, accumulation and engine, in norm and direction, for every objective.

The loss alone would not show it: losses agree while gradients are off by a factor of the world size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Objective
from pipeline.dist.group import Place, process_group
from pipeline.engine import optimizers
from pipeline.engine.accumulate import accumulate
from pipeline.engine.base import SingleEngine
from tests.contracts.components import (
    CONTEXT,
    RESNET,
    VARIANTS,
    build_objective,
    has_phases,
    make_batch,
    names,
    stir,
)
from tests.ranks import free_port, rank_environment, start_ranks

ENGINES = [("accelerate", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
Way = tuple[str, int, int]
"""Engine, ZeRO stage and accumulation."""
EVERY_WAY: dict[int, list[Way]] = {
    world: [(*engine, accumulation) for engine in ENGINES] for world, accumulation in {4: 2, 2: 1, 1: 4}.items()
}
"""By world size."""
EVERY_KIND: dict[int, list[Way]] = {
    4: [("deepspeed", 2, 2)],
    2: [("accelerate", 0, 2), ("deepspeed", 3, 1)],
    1: [("accelerate", 0, 4)],
}
"""What an objective of its own can get wrong: what it makes of parts of a batch, of other ranks, of averages that come
late, and of parameters that are whole only inside its forward. How an engine treats a loss does not depend on which."""
SECOND_ORDER = EVERY_KIND | {2: [("accelerate", 0, 2), ("deepspeed", 1, 1)]}
"""A gradient within the forward needs whole parameters: ZeRO 3 is refused."""
WITH_BATCH_NORM: dict[int, list[Way]] = {4: [("accelerate", 0, 1)], 2: [("deepspeed", 3, 1)]}
"""Without accumulation, since the statistics are those of a micro-batch over all ranks."""
NAMES = [n for n in names() if not has_phases(n)]
"""Those with phases: ``test_phases.py``."""
REPRESENTATIVES = {"mae", "clip"}
"""One that is the mean over samples and one that compares them: for them the engines are tried in every way."""
CASES = [*NAMES, *(n for n in VARIANTS if not has_phases(n))]
ALIKE = {
    f"{name} with batch norm"
    for name in (
        "adapt_drcn", "adapt_neighbours", "adapt_shot", "adapt_wdan", "coral_sources", "colorization",
        "exemplar", "group_dro", "jigsaw", "pseudo_label", "relative_patch",
    )
}  # fmt: skip
"""Tried by `make test-all`: batch norm comes to their encoders as it comes to others that are tried."""
assert set(CASES) >= ALIKE
GLOBAL_BATCH = 8
RATE = 1000.0
"""So large that the rounding of `weight - rate * gradient` does not hide the gradient."""


class Plan:
    """The part of a plan that engines use."""

    def __init__(self, world: int, accumulation: int) -> None:
        self.global_batch, self.accumulation, self.frozen = GLOBAL_BATCH, accumulation, {}
        self.micro_batch = GLOBAL_BATCH // world // accumulation


def descent(objective: Objective, config: OptimizerConfig, frozen: object) -> torch.optim.Optimizer:
    """Plain gradient descent, whose update is the gradient."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.SGD([{"params": parameters, "lr_scale": 1.0}], lr=1.0)


def gradient_of(engine: SingleEngine, name: str, place: Place, plan: Plan) -> tuple[float, NDArray[np.float64]]:
    """Norm, as the engine tells it, and gradient, as the weights have moved by it."""
    with engine.whole_parameters():
        before = [p.detach().clone() for p in engine.objective.parameters() if p.requires_grad]
    batch = make_batch(engine.objective, name, GLOBAL_BATCH)
    mine = place.rank * GLOBAL_BATCH // place.world_size
    starts = range(mine, mine + plan.accumulation * plan.micro_batch, plan.micro_batch)
    parts = [{field: value[s : s + plan.micro_batch] for field, value in batch.items()} for s in starts]
    assert len(list(accumulate(engine, parts, CONTEXT))) == plan.accumulation
    norm = float(engine.update(RATE))
    with engine.whole_parameters():
        after = [p.detach().clone() for p in engine.objective.parameters() if p.requires_grad]
    moved = [(a.double() - b.double()) / RATE for a, b in zip(before, after, strict=True)]
    return norm, torch.cat([m.flatten() for m in moved]).numpy()


Found = dict[tuple[int, Way], tuple[float, NDArray[np.float64]]]
"""By world size and way: norm and gradient."""


def gradients(name: str, ways: dict[int, list[Way]], ports: dict[int, int]) -> Found:
    """Of an objective in each way, on a rank, which is in the largest group and then perhaps in smaller ones."""
    optimizers.build = descent
    found, rank = {}, int(os.environ["RANK"])
    for world in (world for world in ways if rank < world):
        os.environ.update(rank_environment(rank, world, ports[world]))
        with new_group() as place:
            for way in ways[world]:
                plan = Plan(world, way[2])
                found[world, way] = gradient_of(make_engine(name, way, plan, place), name, place, plan)
    return found


@contextmanager
def new_group() -> Iterator[Place]:
    """A process group in a process that may have had another one, which the libraries of the engines have kept."""
    from accelerate.state import AcceleratorState
    from deepspeed import comm

    AcceleratorState._reset_state(reset_partial_state=True)
    comm.comm.cdb = None
    with process_group(2.0) as place:
        yield place


def make_engine(name: str, way: Way, plan: Plan, place: Place) -> SingleEngine:
    engine, stage, _ = way
    zero = {"zero": stage} if engine == "deepspeed" else {}
    config = EngineConfig(name=engine, precision="fp32", micro_batch=plan.micro_batch, **zero)
    objective = stir(build_objective(name)).train()
    if engine == "deepspeed":
        from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
    else:
        from pipeline.engine.accelerate import AccelerateEngine as Engine
    return Engine(objective, config, OptimizerConfig(lr=1.0), plan, place)


def oracle(name: str) -> NDArray[np.float64]:
    """Autograd on the whole batch, in this process, without any engine."""
    objective = stir(build_objective(name)).train()
    objective(make_batch(objective, name, GLOBAL_BATCH), CONTEXT).loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.requires_grad]
    return torch.cat([g.double().flatten() for g in gradients if g is not None]).numpy()


def has_batch_norm(name: str) -> bool:
    return any(isinstance(module, _BatchNorm) for module in build_objective(name).modules())


def ways_of(name: str) -> dict[int, list[Way]]:
    if build_objective(name).second_order:
        return SECOND_ORDER
    return EVERY_WAY if name in REPRESENTATIVES else WITH_BATCH_NORM if has_batch_norm(name) else EVERY_KIND


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in CASES])
def test_the_gradient_does_not_depend_on_ranks_accumulation_or_engine(name):
    ways = ways_of(name)
    ended = start_ranks(max(ways), gradients, name=name, ways=ways, ports={world: free_port() for world in ways})
    assert [e.problem for e in ended] == [None] * max(ways)
    expected = oracle(name)
    size = np.linalg.norm(expected)
    assert size > 1e-3
    for rank, end in enumerate(ended):
        assert set(end.value) == {(world, way) for world in ways if rank < world for way in ways[world]}
        for (world, how), (norm, gradient) in end.value.items():
            error = np.linalg.norm(gradient - expected) / size
            assert error < 1e-5, f"rank {rank} of {world}, {how}: off by {error:.1e}"
            assert norm == pytest.approx(size, rel=1e-5), (rank, world, how)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_whose_encoder_can_have_batch_norm_is_tried_with_it(name):
    cases = {other for other, (objective, _) in VARIANTS.items() if objective == name} | {name}
    if not any(has_batch_norm(case) for case in cases):  # it must have no encoder, or one that cannot have batch norm
        with pytest.raises((ConfigError, ValueError)):
            build_objective(name, **RESNET)
