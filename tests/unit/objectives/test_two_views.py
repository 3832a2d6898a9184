"""Barlow Twins, VICReg and BYOL: each loss against the authors' as plainly as it can be written, and cut into parts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

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


@pytest.mark.parametrize(("name", "written"), [("barlow_twins", barlow_twins), ("vicreg", vicreg)])
def test_loss_and_gradient_are_those_of_the_authors_code(name, written, lone_group):
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


def test_the_three_terms_of_vicreg_are_told_and_weighted(lone_group):
    _, _, embeddings = rows()
    out = build("vicreg", invariance=2.0, variance=3.0, covariance=5.0).loss(embeddings, CTX)
    told = {name: float(value) for name, value in out.metrics.items()}
    weighted = 2 * told["invariance"] + 3 * told["variance"] + 5 * told["covariance"]
    assert float(out.loss.detach()) == pytest.approx(weighted, rel=1e-6)
    equal = Embeddings({n: torch.ones(10, 6) for n in ("embedding", "embedding2", "features")}, {})
    collapsed = build("vicreg").loss(equal, CTX).metrics
    assert float(collapsed["variance"]) == pytest.approx(1 - 0.0001**0.5) and float(collapsed["covariance"]) == 0
    assert float(build("vicreg", deviation=2.0).loss(equal, CTX).metrics["variance"]) == pytest.approx(1.99)


def test_a_correlation_is_blind_to_scale_and_place(lone_group):
    first, second, embeddings = rows()
    moved = {"embedding": 7 * first.float() + 3, "embedding2": 0.5 * second.float(), "features": first.float()}
    model = build("barlow_twins")
    expected = model.loss(embeddings, CTX).loss
    torch.testing.assert_close(model.loss(Embeddings(moved, {}), CTX).loss, expected, rtol=1e-3, atol=1e-4)


def without_batch_norm(model: nn.Module) -> nn.Module:
    """Its statistics are those of a micro-batch, and would hide whether the loss's own are the global batch's."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, nn.Identity())
        else:
            without_batch_norm(child)
    return model


def moved(accumulation: int) -> dict[str, np.ndarray]:
    """By name: how far the weights go in an update of plain gradient descent, on one rank of a group."""
    from pipeline.engine.accelerate import AccelerateEngine

    optimizers.build = descent
    found = {}
    with process_group(2.0) as place:
        plan = Plan(place.world_size, accumulation)
        config = EngineConfig(name="accelerate", precision="fp32", micro_batch=plan.micro_batch)
        for name in ("barlow_twins", "vicreg"):
            engine = AccelerateEngine(without_batch_norm(build(name)), config, OptimizerConfig(lr=1.0), plan, place)
            before = [p.detach().clone() for p in engine.objective.parameters()]
            mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch().items()}
            parts = [
                dict(zip(mine, p, strict=True))
                for p in zip(*(v.chunk(accumulation) for v in mine.values()), strict=True)
            ]
            list(accumulate(engine, parts, CTX))
            engine.update(1.0)
            after = [p.detach() for p in engine.objective.parameters()]
            found[name] = torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)]).double().numpy()
    return found


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2)])
def test_statistics_are_those_of_the_global_batch_however_it_is_cut(world, accumulation):
    ended = start_ranks(world, moved, accumulation=accumulation)
    assert [e.problem for e in ended] == [None] * world
    for name, written in (("barlow_twins", barlow_twins), ("vicreg", vicreg)):
        model = without_batch_norm(build(name)).double()
        z = [model.head(model.encoder(model.view(batch(), CTX, n).double())) for n in ("image", "image2")]
        written(*z).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
        for end in ended:
            error = np.linalg.norm(end.value[name] - expected) / np.linalg.norm(expected)
            assert error < 1e-3, f"{name}: off by {error:.1e}"


def byol(model: Any, first: Tensor, second: Tensor) -> Tensor:
    """google-deepmind/deepmind-research, byol/byol_experiment.py, ``loss_fn``, in torch."""

    def regression(x: Tensor, y: Tensor) -> Tensor:
        x, y = functional.normalize(x, dim=-1), functional.normalize(y, dim=-1)
        return (x - y).square().sum(dim=-1)

    predictions = [model.predictor(model.head(model.encoder(x))) for x in (first, second)]
    with torch.no_grad():
        targets = [model.target["head"](model.target["encoder"](x)) for x in (first, second)]
    return (regression(predictions[0], targets[1]) + regression(predictions[1], targets[0])).mean()


def test_byols_loss_gradient_and_statistics_are_those_of_its_code(lone_group):
    model: Any = build("byol").double()
    with torch.no_grad():
        for p in model.target.parameters():  # else target and predictor's input are the same
            p.add_(0.1 * torch.randn_like(p))
    plain = copy.deepcopy(model)
    expected = byol(plain, *(model.view(batch(), CTX, name).double() for name in ("image", "image2")))
    expected.backward()
    out = model(batch(), CTX)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=1e-7)
    assert out.losses.shape == (GLOBAL,) and 0 < float(out.loss.detach()) < 8
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None) == name.startswith("target."), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)  # running statistics, the target's own too


def test_byols_heads_and_target():
    model: Any = build("byol", encoder_args=RESNET | {"drop_path_rate": 0.5})
    kinds = [type(layer).__name__ for layer in model.head]
    assert kinds == ["Linear", "GlobalBatchNorm", "ReLU", "Linear"]
    assert kinds == [type(layer).__name__ for layer in model.predictor]
    assert [tuple(layer.weight.shape) for layer in model.predictor if isinstance(layer, nn.Linear)] == [
        (12, 6),
        (6, 12),
    ]
    for name in ("encoder", "head"):
        source, target = getattr(model, name), model.target[name]
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
        assert not any(p.requires_grad for p in target.parameters())
    dropping = [m.p for m in model.modules() if type(m).__name__ == "SampleDropout"]
    assert sorted(set(dropping)) == sorted({0.0, *(m.p for m in model.encoder.modules() if hasattr(m, "p"))})
    assert {m.p for m in model.target.modules() if hasattr(m, "p")} == {0.0}


def test_byols_target_keeps_more_and_more_of_itself():
    model = build("byol", momentum=0.9)
    moves = list(model.averages(Clock(0, 25, 100)))
    trained = {id(p) for n, p in model.named_parameters() if n.startswith(("encoder.", "head."))}
    assert {id(m.source) for m in moves} == trained and len(moves) == len(trained)
    assert [m.keep for m in moves] == pytest.approx([1 - 0.1 * (2**-0.5 + 1) / 2] * len(moves))
    assert [next(iter(model.averages(Clock(0, n, 100)))).keep for n in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])


@pytest.mark.parametrize("name", ["barlow_twins", "byol", "vicreg"])
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
