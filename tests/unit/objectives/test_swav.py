"""SwAV: the loss and the queue by hand, over steps and ranks, and what it says of crops that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.engine import optimizers
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.accumulate import accumulate
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.objectives.swav import Config, SwAV
from tests.contracts.test_gradients import Plan, descent
from tests.ranks import start_ranks

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
GLOBAL, STEPS, RATE = 8, 4, 0.5
SIZES = ((16, 16), (16, 16), (8, 8), (8, 8))


def build(sizes: tuple[tuple[int, int], ...] = SIZES, **settings: Any) -> SwAV:
    torch.manual_seed(0)
    defaults = {
        "encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "dim": 6, "hidden": 10, "prototypes": 5, "queue": 16,
        "queue_from": 0.0, "epsilon": 0.1,
    }  # fmt: skip
    return SwAV(Config(**defaults | settings), DataFacts((16, 16), (), views=sizes)).train()


def batch(step: int, crops: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    found = {"id": torch.arange(GLOBAL) + 100 * step, "epoch": torch.zeros(GLOBAL, dtype=torch.int64)}
    for number in range(crops):
        side = 16 if number < 2 else 8
        image = torch.randint(0, 256, (GLOBAL, 3, side, side), dtype=torch.uint8, generator=generator)
        found[f"image{number + 1 if number else ''}"] = image
    return found


def context(step: int) -> StepContext:
    return StepContext(seed=5, clock=Clock(step, step * GLOBAL, STEPS * GLOBAL))


def plain_codes(scores: Tensor, epsilon: float) -> Tensor:
    q = (scores.double() / epsilon).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_z(model: SwAV, data: Batch, ctx: StepContext) -> tuple[Tensor, ...]:
    """Unit vectors of each crop."""
    views = list(model.views(data, ctx).values())
    parts = [torch.cat(views[:2]), *([torch.cat(views[2:])] if views[2:] else [])]
    return functional.normalize(model.head(torch.cat([model.encoder(x) for x in parts])), dim=1).chunk(len(views))


def plain_loss(model: SwAV, data: Batch, ctx: StepContext, queue: list[Tensor], at: int) -> tuple[Tensor, list[Tensor]]:
    """As the paper's pseudocode has it, crop by crop."""
    z = plain_z(model, data, ctx)
    directions = functional.normalize(model.prototypes.weight, dim=1)
    loss = 0
    for own in (0, 1):
        scores = z[own] @ directions.T
        known = torch.stack([row[own] for row in queue]) @ directions.T if len(queue) >= at else scores[:0]
        q = plain_codes(torch.cat([known, scores]).detach(), model.config.epsilon)[-len(scores) :]
        for other in range(len(z)):
            if other != own:
                p = functional.softmax(z[other] @ directions.T / 0.1, dim=1)
                loss = loss - (q * p.log()).sum(1).mean() / (2 * (len(z) - 1))
    return loss, [torch.stack([z[0][i], z[1][i]]).detach() for i in range(len(data["id"]))]


@pytest.mark.parametrize("crops", [2, 4])
def test_the_loss_is_the_pseudocode(crops, lone_group):
    model = build(SIZES[:crops], queue=0)
    expected, _ = plain_loss(model, batch(0, crops), context(0), [], at=1)
    out = model(batch(0, crops), context(0))
    torch.testing.assert_close(out.loss, expected.float(), rtol=1e-5, atol=1e-6)
    directions = functional.normalize(model.prototypes.weight, dim=1)
    nearest = [(z @ directions.T).argmax(dim=1) for z in plain_z(model, batch(0, crops), context(0))[:2]]
    assert float(out.metrics["same_cluster"]) == pytest.approx(float((nearest[0] == nearest[1]).float().mean()))


def trained(steps: int = STEPS) -> tuple[dict[str, np.ndarray], list[float]]:
    """State and losses after a few steps, on one rank of a group. Batch norm is left out, so that parts may differ."""
    optimizers.build = descent
    with process_group(2.0) as place:
        model = build()
        model.head[1] = nn.Identity()
        plan = Plan(place.world_size, 2)
        config = EngineConfig(name="accelerate", precision="fp32", micro_batch=plan.micro_batch)
        engine = AccelerateEngine(model, config, OptimizerConfig(lr=1.0), plan, place)
        losses = []
        for step in range(steps):
            mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch(step).items()}
            parts = [dict(zip(mine, p, strict=True)) for p in zip(*(v.chunk(2) for v in mine.values()), strict=True)]
            losses.append([float(out.loss.detach()) for out, _ in accumulate(engine, parts, context(step))][-1])
            engine.update(RATE)
            engine.after_step(context(step + 1).clock)
        return {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}, losses


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_and_queue_are_those_of_a_plain_loop_at_every_world_size_and_accumulation(world):
    ended = start_ranks(world, trained)
    assert [e.problem for e in ended] == [None] * world
    model = build()
    model.head[1] = nn.Identity()
    trainable, queue, losses = [p for p in model.parameters() if p.requires_grad], [], []
    for step in range(STEPS):
        loss, fresh = plain_loss(model, batch(step), context(step), queue, at=16)
        gradients = torch.autograd.grad(loss, trainable)
        with torch.no_grad():
            for p, g in zip(trainable, gradients, strict=True):
                p -= RATE * g
        queue = [*queue, *fresh][-16:]
        losses.append(float(loss.detach()))
    for end in ended:
        state, _ = end.value
        for name, p in model.named_parameters():
            np.testing.assert_allclose(state[name], p.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
        rows = {row.tobytes() for row in state["queue"].round(4)}
        assert len(rows) == 16
        found = np.sort(state["queue"].reshape(16, -1), axis=0)
        np.testing.assert_allclose(found, np.sort(torch.stack(queue).reshape(16, -1).numpy(), axis=0), atol=1e-4)
        assert state["filled"].tolist() == [GLOBAL * STEPS]
    assert np.mean([end.value[1] for end in ended], axis=0) == pytest.approx(losses, rel=1e-4)


def test_a_queue_that_is_not_full_or_not_begun_changes_nothing(lone_group):
    expected = build(queue=0)(batch(0), context(0)).loss
    late = build(queue_from=1.0)
    assert torch.equal(late(batch(0), context(0)).loss, expected)
    late.after_step(context(1).clock)
    assert not late.filled and not late.queue.any()
    model = build()
    model(batch(1), context(1))
    model.after_step(context(2).clock)
    half = model(batch(0), context(0)).loss
    torch.testing.assert_close(half, expected, rtol=1e-6, atol=1e-7)
    model(batch(2), context(2))
    model.after_step(context(3).clock)
    assert not torch.allclose(model(batch(0), context(0)).loss, expected, rtol=1e-4)


def test_the_head_is_the_authors(lone_group):
    head = build().head
    assert [type(m) for m in head] == [nn.Linear, GlobalBatchNorm, nn.ReLU, nn.Linear]
    assert head[0].bias is None and head[3].bias is not None
    scores = build().prototypes(functional.normalize(torch.randn(3, 6), dim=1))
    assert scores.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("sizes", [((16, 16),), ((16, 16), (8, 8), (8, 8))])
def test_it_needs_two_large_crops(sizes):
    with pytest.raises(ConfigError, match=r"objective 'swav' compares two large crops.*16x16.*data\.image\.views = 2"):
        build(sizes)


def test_an_encoder_that_takes_one_size_alone_is_refused():
    with pytest.raises(ConfigError, match="timm cannot build 'mixer_s16_224'"):
        build(((32, 32), (32, 32), (16, 16)), encoder="mixer_s16_224", encoder_args={})


def test_crops_that_do_not_fit_an_encoders_patches_are_refused():
    with pytest.raises(ConfigError, match="12x12 does not fit the encoder's patches of 8x8"):
        build(((16, 16), (16, 16), (12, 12)))
