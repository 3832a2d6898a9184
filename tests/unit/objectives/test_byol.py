"""BYOL against its authors' loss, its heads, and its target."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Clock
from tests.unit.objectives.two_views import CTX, GLOBAL, RESNET, batch, build


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
