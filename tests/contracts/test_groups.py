"""Parameter groups of a configuration, under every engine, against a loop of plain torch.

There a parameter that is frozen has no gradient: it does not move, AdamW does not count its steps, and the norm by
which gradients are clipped does not see it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Clock, Objective
from pipeline.dist.group import Place, process_group
from pipeline.engine import optimizers
from pipeline.engine.base import BaseEngine
from pipeline.engine.fragments import Spec
from tests.contracts.components import CONTEXT, build_objective, make_batch
from tests.contracts.test_gradients import ENGINES, Plan
from tests.ranks import start_ranks

RATES = (1e-3, 2e-3, 3e-3, 2e-3, 1e-3)
BACKBONE = "encoder.backbone"
CONFIG = OptimizerConfig.model_validate(
    {
        "lr": 1.0,
        "weight_decay": 0.5,
        "weight_decay_end": 4.0,
        "lr_vectors": 3.0,
        "eps": 1e-4,
        "clip": 0.05,
        "groups": [
            {"prefix": "head", "lr": 7.0, "weight_decay": 0.0},
            {"prefix": f"{BACKBONE}.patch_embed.", "frozen": True},
            {"prefix": f"{BACKBONE}.blocks", "lr": 0.5},
            {"prefix": f"{BACKBONE}.blocks.0", "frozen_until": "2ba"},
            {"prefix": f"{BACKBONE}.norm", "frozen_from": "3ba", "weight_decay": 0.25},
        ],
    }
)
FROZEN = {f"{BACKBONE}.blocks.0": (0, 2), f"{BACKBONE}.norm": (3, 5)}


def rule_of(name: str, step: int) -> tuple[float, float, bool]:
    """Part of the rate, decay and whether trained, written down by hand for each parameter of the smoke model."""
    scale, decay, trained = 1.0, (0.5, 0.83422026, 1.70922026, 2.79077974, 3.66577974)[step], True
    if name.startswith("head."):
        scale, decay = 7.0, 0.0
    elif name.startswith(f"{BACKBONE}.patch_embed."):
        trained = False
    elif name.startswith(f"{BACKBONE}.blocks.0."):
        trained = step >= 2
    elif name.startswith(f"{BACKBONE}.blocks.1."):
        scale = 0.5
    elif name.startswith(f"{BACKBONE}.norm."):
        decay, trained = 0.25, step < 3
    return scale, decay, trained


def plain() -> dict[str, NDArray[np.float32]]:
    """Weights after all steps: one optimizer a parameter, on the whole batch."""
    objective = build_objective("supervised").train()
    batch, spared = make_batch(objective, "supervised"), objective.no_weight_decay()
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step, rate in enumerate(RATES):
        objective.zero_grad()
        objective(batch, CONTEXT).loss.backward()
        moving = {n: p for n, p in objective.named_parameters() if rule_of(n, step)[2]}
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in moving.values() if p.grad is not None]))
        assert norm > 0.1  # so that it is clipped
        for name, parameter in moving.items():
            scale, decay, _ = rule_of(name, step)
            parameter.grad *= 0.05 / norm
            mine = {
                "weight_decay": decay if parameter.ndim > 1 and name not in spared else 0.0,
                "lr": rate * scale * (3.0 if parameter.ndim == 1 else 1.0),
            }
            made = optimizers.setdefault(name, torch.optim.AdamW([parameter], betas=(0.9, 0.95), eps=1e-4))
            made.param_groups[0].update(mine)
            made.step()
    return {n: p.detach().numpy() for n, p in objective.named_parameters()}


def make(name: str, stage: int, place: Place) -> BaseEngine:
    zero = {"zero": stage} if name == "deepspeed" else {}
    config = EngineConfig(name=name, precision="fp32", micro_batch=8 // place.world_size, **zero)
    if name == "deepspeed":
        from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
    else:
        from pipeline.engine.accelerate import AccelerateEngine as Engine
    plan: Any = Plan(place.world_size, 1)
    plan.frozen = FROZEN
    objective = build_objective("supervised").train()
    optimizers.freeze(objective, CONFIG.groups, "test")
    return Engine(objective, config, CONFIG, plan, place)


def go(engine: BaseEngine, steps: range) -> None:
    size = 8 // engine.place.world_size
    rows = slice(engine.place.rank * size, (engine.place.rank + 1) * size)
    batch = {field: value[rows] for field, value in make_batch(engine.objective, "supervised").items()}
    for step in steps:
        engine.before_step(Clock(step, 8 * step, 40))
        engine.backward(engine.forward(batch, CONTEXT, last=True).loss, last=True)
        engine.update(RATES[step])


def weights(engine: BaseEngine) -> dict[str, NDArray[np.float32]]:
    with engine.whole_parameters():
        return {n: p.detach().numpy().copy() for n, p in engine.objective.named_parameters()}


def trained() -> dict[tuple[str, int], list[dict[str, NDArray[np.float32]]]]:
    """Of each engine: weights after all steps, and those of an engine that was filled after the second."""
    found = {}
    with process_group(2.0) as place:
        for name, stage in ENGINES:
            engine = make(name, stage, place)
            go(engine, range(2))
            kept = [copy.deepcopy(fragment) for fragment in engine.held()]
            go(engine, range(2, 5))
            other = make(name, stage, place)
            other.make_state({f.name: Spec(f.shape, str(f.data.dtype)[6:]) for f in kept})
            stored = {(f.name, f.start): f.data for f in kept}
            for fragment in other.held():
                fragment.data.copy_(stored.pop((fragment.name, fragment.start)))
            assert not stored
            other.publish()
            go(other, range(2, 5))
            found[name, stage] = [weights(engine), weights(other)]
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_groups_train_as_in_plain_torch(world):
    ended = start_ranks(world, trained)
    assert [e.problem for e in ended] == [None] * world
    start = {n: p.detach().numpy() for n, p in build_objective("supervised").named_parameters()}
    expected = plain()
    assert len(ended[0].value) == len(ENGINES)
    for how, (found, resumed) in ended[0].value.items():
        for name, want in expected.items():
            np.testing.assert_array_equal(resumed[name], found[name], err_msg=f"{how}, {name}")
            moved = np.linalg.norm(want - start[name])
            error = np.linalg.norm(found[name] - want)
            assert (moved == 0) == name.startswith(f"{BACKBONE}.patch_embed."), name
            assert error <= 2e-3 * moved, f"{how}, {name}: off by {error / moved:.1e}"


def supervised(*groups: dict[str, Any]) -> Objective:
    objective = build_objective("supervised")
    optimizers.freeze(objective, OptimizerConfig.model_validate({"lr": 1.0, "groups": groups}).groups, "run.toml")
    return objective


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("haed", r"optimizer\.groups\[0\]\.prefix: 'haed': .* there are: encoder, head$"),
        ("hea", "there are: encoder, head$"),
        ("encoder.backbone.block", r"encoder\.backbone\.pos_embed, .*encoder\.backbone\.blocks, "),
        ("encoder.backbone.blocks.7", r"are: encoder\.backbone\.blocks\.0, encoder\.backbone\.blocks\.1$"),
        ("encoder.backbone.blocks.0.zzz.weight", r"are: encoder\.backbone\.blocks\.0\.norm1, .*blocks\.0\.attn, "),
    ],
)
def test_a_prefix_that_holds_nothing_says_what_there_is(prefix, said):
    with pytest.raises(Mistakes, match=said):
        supervised({"prefix": prefix, "lr": 0.1})


def test_all_frozen_is_a_mistake_and_so_is_a_group_of_what_is_frozen_anyway():
    with pytest.raises(Mistakes, match="nothing is left to train"):
        supervised({"prefix": "encoder", "frozen": True}, {"prefix": "head", "frozen": True})
    objective = build_objective("moco")
    groups = OptimizerConfig.model_validate({"lr": 1.0, "groups": [{"prefix": "momentum", "lr": 0.1}]}).groups
    with pytest.raises(Mistakes, match="'momentum': all that it holds is frozen by the objective"):
        optimizers.freeze(objective, groups, "run.toml")
