"""Methods with two views against their authors' losses, as plainly as these can be written, and cut to pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.dist.group import process_group
from pipeline.engine import optimizers
from pipeline.engine.accumulate import accumulate
from tests.contracts.test_gradients import Plan, descent
from tests.ranks import start_ranks
from tests.unit.objectives.two_views import CTX, GLOBAL, batch, build, rows


def off_diagonal(x: Tensor) -> Tensor:
    return x[~torch.eye(len(x), dtype=torch.bool)]


def barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    """facebookresearch/barlowtwins, main.py, ``forward``, on one process."""
    one, other = (functional.batch_norm(x, None, None, training=True) for x in (first, second))
    c = one.T @ other / len(first)
    return (c.diagonal() - 1).pow(2).sum() + 0.0051 * off_diagonal(c).pow(2).sum()


def vicreg(first: Tensor, second: Tensor) -> Tensor:
    """facebookresearch/vicreg, main_vicreg.py, ``forward``, on one process."""
    spread, together = first.new_zeros(()), first.new_zeros(())
    for x in (first, second):
        spread = spread + functional.relu(1 - (x.var(dim=0) + 0.0001).sqrt()).mean() / 2
        together = together + off_diagonal(torch.cov(x.T)).pow(2).sum() / x.shape[1]
    return 25 * functional.mse_loss(first, second) + 25 * spread + together


WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"barlow_twins": barlow_twins, "vicreg": vicreg}


@pytest.mark.parametrize("name", WRITTEN)
def test_loss_and_gradient_are_those_of_the_authors_code(name, lone_group):
    """Of given embeddings, in float64."""
    first, second, embeddings = rows()
    first.requires_grad_()
    second.requires_grad_()
    expected = WRITTEN[name](first, second)
    expected.backward()
    out = build(name).loss(embeddings, CTX)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in (("embedding", first), ("embedding2", second)):
        torch.testing.assert_close(embeddings.rows[mine].grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Its statistics are those of a micro-batch, and would hide whether the loss's own are the global batch's."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, nn.Identity())
        else:
            without_batch_norm(child)
    return model


def moved(name: str, accumulation: int) -> np.ndarray:
    """How far the weights go in an update of plain gradient descent, on one rank of a group."""
    from pipeline.engine.accelerate import AccelerateEngine

    optimizers.build = descent
    with process_group(2.0) as place:
        plan = Plan(place.world_size, accumulation)
        config = EngineConfig(name="accelerate", precision="fp32", micro_batch=plan.micro_batch)
        engine = AccelerateEngine(without_batch_norm(build(name)), config, OptimizerConfig(lr=1.0), plan, place)
        before = [p.detach().clone() for p in engine.objective.parameters()]
        mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch().items()}
        parts = [
            dict(zip(mine, p, strict=True)) for p in zip(*(v.chunk(accumulation) for v in mine.values()), strict=True)
        ]
        list(accumulate(engine, parts, CTX))
        engine.update(1.0)
        after = [p.detach() for p in engine.objective.parameters()]
        return torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)]).double().numpy()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2)])
@pytest.mark.parametrize("name", WRITTEN)
def test_statistics_are_those_of_the_global_batch_however_it_is_cut(name, world, accumulation):
    """The gradient of a batch that is cut to pieces is that of the loss of the whole, as it is written above."""
    ended = start_ranks(world, moved, name=name, accumulation=accumulation)
    assert [e.problem for e in ended] == [None] * world
    model: Any = without_batch_norm(build(name)).double()
    z = [model.head(model.encoder(model.view(batch(), CTX, n).double())) for n in ("image", "image2")]
    WRITTEN[name](*z).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()
    for end in ended:
        error = np.linalg.norm(end.value - expected) / np.linalg.norm(expected)
        assert error < 1e-3, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("name", ["byol", *WRITTEN])
def test_views_are_coloured_unequally_and_encoded_each_by_itself(name, lone_group):
    model = build(name)
    data = batch() | {"image2": batch()["image"]}
    seen = model.inputs(data, CTX)
    assert not torch.equal(seen["view"], seen["view2"]) and torch.equal(seen["image"], seen["image2"])
    sizes = []
    model.encoder.register_forward_hook(lambda _, given, out: sizes.append(len(given[0])))
    found = model.embed(data, CTX)
    assert sizes == [GLOBAL, GLOBAL] and not found["features"].requires_grad
    solarised = build(name, colour={"solarize": 1.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0})
    view = solarised.view(data, CTX, "image") * 255
    plain = data["image"].float()
    torch.testing.assert_close(view, torch.where(plain >= 128, 255 - plain, plain))
