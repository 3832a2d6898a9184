"""What the tests of methods with two views share: small models, batches, and what an update moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core import registry
from pipeline.core.protocols import Batch, Clock, DataFacts, Embeddings, StepContext
from pipeline.dist.group import process_group
from pipeline.engine import optimizers
from pipeline.engine.accumulate import accumulate
from pipeline.nn.two_views import TwoViewObjective
from tests.contracts.test_gradients import Plan, descent
from tests.ranks import start_ranks

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "zero_init_last": False}
GLOBAL = 8


def build(name: str, **settings: Any) -> TwoViewObjective:
    torch.manual_seed(0)
    module = registry.module("pipeline.objectives", name)
    defaults = {"encoder": "resnet18", "encoder_args": RESNET, "small_stem": True, "hidden": 12, "dim": 6}
    cls = registry.component("pipeline.objectives", name, TwoViewObjective)
    return cls(module.Config(**defaults | settings), DataFacts((16, 16), ())).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, GLOBAL, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = torch.arange(GLOBAL)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images[0], "image2": images[1]}


def rows(samples: int = 10, width: int = 6) -> tuple[Tensor, Tensor, Embeddings]:
    """Embeddings in which features are correlated, of unequal spread, and far from zero."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(samples, width, generator=generator) @ torch.randn(width, width, generator=generator) * 0.3 + 5
    second = first + 0.2 * torch.randn(samples, width, generator=generator)
    parts = {"embedding": first.clone().requires_grad_(), "embedding2": second.clone().requires_grad_()}
    return first.double(), second.double(), Embeddings(parts | {"features": first}, {})


def off_diagonal(x: Tensor) -> Tensor:
    return x[~torch.eye(len(x), dtype=torch.bool)]


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


def check_global_statistics(name: str, written: Any, world: int, accumulation: int) -> None:
    """The gradient of a batch that is cut to pieces is that of the loss of the whole, as it is written in a test."""
    ended = start_ranks(world, moved, name=name, accumulation=accumulation)
    assert [e.problem for e in ended] == [None] * world
    model: Any = without_batch_norm(build(name)).double()
    z = [model.head(model.encoder(model.view(batch(), CTX, n).double())) for n in ("image", "image2")]
    written(*z).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()
    for end in ended:
        error = np.linalg.norm(end.value - expected) / np.linalg.norm(expected)
        assert error < 1e-3, f"{name}: off by {error:.1e}"


def check_as_written(name: str, written: Any) -> None:
    """Loss and gradient of given embeddings are those of a plain transcription, in float64."""
    first, second, embeddings = rows()
    first.requires_grad_()
    second.requires_grad_()
    expected = written(first, second)
    expected.backward()
    out = build(name).loss(embeddings, CTX)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in (("embedding", first), ("embedding2", second)):
        torch.testing.assert_close(embeddings.rows[mine].grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def check_views(name: str) -> None:
    """Views are coloured unequally and encoded each by itself."""
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
