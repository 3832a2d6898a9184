"""The layer-wise learning rates really reach the weights, under every engine and after every change of the rate.

Adam's update is the learning rate times nearly the gradient's sign, as long as the gradient stays the same: so how far
a weight moves tells the rate that it was given, whatever the engine made of the parameter groups.
"""

from __future__ import annotations

import pytest
import torch

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.dist.group import process_group
from tests.contracts.components import CONTEXT, build_objective, make_batch
from tests.contracts.test_gradients import ENGINES, Plan
from tests.ranks import start_ranks

DECAY = 0.5
RATES = (1e-5, 4e-5, 2e-5)
"""As a schedule would set them, one per step; small, so that the gradient stays the same."""
LAYERS = {
    "encoder.backbone.cls_token": 3,
    "encoder.backbone.patch_embed.proj.weight": 3,
    "encoder.backbone.blocks.0.attn.qkv.weight": 2,
    "encoder.backbone.blocks.1.mlp.fc2.bias": 1,
    "encoder.backbone.norm.weight": 1,
    "head.weight": 0,
}
"""How many layers lie between a parameter and the classifier, in the smoke config's two blocks."""


def moves() -> dict[tuple[str, int], list[dict[str, float]]]:
    """For each engine and each step: the median distance that the elements of each parameter moved."""
    found = {}
    with process_group(2.0) as place:
        for name, stage in ENGINES:
            zero = {"zero": stage} if name == "deepspeed" else {}
            config = EngineConfig(name=name, precision="fp32", micro_batch=8 // place.world_size, **zero)
            if name == "deepspeed":
                from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
            else:
                from pipeline.engine.accelerate import AccelerateEngine as Engine
            objective = build_objective("supervised").train()
            optimizer = OptimizerConfig(lr=1.0, layer_decay=DECAY, weight_decay=0.0, eps=1e-12)
            engine = Engine(objective, config, optimizer, Plan(place.world_size, 1), place)
            whole = make_batch(objective, "supervised")
            rows = slice(place.rank * config.micro_batch, (place.rank + 1) * config.micro_batch)
            batch = {field: value[rows] for field, value in whole.items()}
            found[name, stage] = steps = []
            for rate in RATES:
                with engine.whole_parameters():
                    before = {n: p.detach().double() for n, p in objective.named_parameters()}
                engine.backward(engine.forward(batch, CONTEXT, last=True).loss, last=True)
                engine.update(rate)
                with engine.whole_parameters():
                    after = {n: p.detach().double() for n, p in objective.named_parameters()}
                steps.append({n: float((after[n] - before[n]).abs().median()) for n in LAYERS})
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_weights_move_by_the_rate_of_their_layer(world):
    ended = start_ranks(world, moves)
    assert [e.problem for e in ended] == [None] * world
    assert len(ended[0].value) == len(ENGINES)
    for engine, steps in ended[0].value.items():
        for rate, moved in zip(RATES, steps, strict=True):
            for parameter, depth in LAYERS.items():
                expected = rate * DECAY**depth
                assert moved[parameter] == pytest.approx(expected, rel=0.05), (engine, rate, parameter)


def test_the_measure_itself():
    """One step of Adam moves every element by the learning rate."""
    weight = torch.nn.Parameter(torch.zeros(5))
    weight.grad = torch.tensor([3.0, -0.1, 1e-3, 7.0, -2.0])
    torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0, eps=1e-12).step()
    torch.testing.assert_close(weight.detach().abs(), torch.full((5,), 1e-3))
