"""DAIC: pairs, thresholds and loss by hand, one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.core.protocols import Batch, Clock, DataFacts, Embeddings, StepContext
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.objectives.daic import DAIC, Config

CTX = StepContext(seed=3, clock=Clock(5, 50, 100))
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}


def build(**settings: Any) -> DAIC:
    torch.manual_seed(0)
    defaults = {"encoder_args": RESNET, "clusters": 4}
    return DAIC(Config(**defaults | settings), DataFacts((32, 32), ())).train()


def batch(samples: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.arange(samples)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images[0], "image2": images[1]}


def test_thresholds_are_the_papers_and_meet_at_the_end():
    model = build()
    for x in (0.0, 0.1, 0.3, 0.45):  # the paper's lambda, which ends at 0.45
        assert model.thresholds(x / 0.45) == pytest.approx((0.95 - x, 0.455 + 0.1 * x))
    upper, lower = model.thresholds(1.0)
    assert upper == pytest.approx(lower)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_pairs_of_which_it_is_sure(progress, lone_group):
    model = build()
    generator = torch.Generator().manual_seed(7)
    seen, told = (nn.functional.normalize((6 * torch.rand(12, 4, generator=generator)).softmax(1)) for _ in range(2))
    ctx = replace(CTX, clock=Clock(1, int(progress * 100), 100))
    upper, lower = 0.95 - 0.45 * progress, 0.455 + 0.045 * progress
    terms, positive = [], 0
    for i in range(12):
        for j in range(12):
            cosine = float(told[i] @ told[j])
            if i == j or lower <= cosine <= upper:
                continue
            p = min(max(float(seen[i] @ seen[j]), 1e-7), 1 - 1e-7)
            terms.append(-math.log(p) if cosine > upper else -math.log(1 - p))
            positive += cosine > upper
    out = model.loss(Embeddings({"seen": seen, "told": told, "features": told}, {}), ctx)
    assert 0 < positive < len(terms) and (len(terms) == 132) == (progress == 1)
    assert float(out.loss) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert float(out.metrics["sure"]) == pytest.approx(len(terms) / 132)
    assert float(out.metrics["together"]) == pytest.approx(positive / len(terms))
    assert float(out.metrics["clusters"]) == len(told.argmax(1).unique())


def test_where_it_is_sure_of_nothing_the_loss_is_zero(lone_group):
    rows = nn.functional.normalize(torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.0, 1.0, 0.9, 0.0]]))
    out = build().loss(
        Embeddings({"seen": rows, "told": rows, "features": rows}, {}), replace(CTX, clock=Clock(0, 0, 100))
    )
    assert float(out.loss) == 0 and float(out.metrics["sure"]) == 0


def test_labels_come_from_the_first_crop_and_gradients_from_the_second(lone_group):
    model = build()
    rows = model.embed(batch(), CTX)
    assert not rows["told"].requires_grad and rows["seen"].requires_grad
    changed = batch() | {"image2": batch()["image"]}
    again = model.embed(changed, CTX)
    torch.testing.assert_close(again["told"], rows["told"])
    assert not torch.allclose(again["seen"], rows["seen"], atol=1e-3)
    norm = torch.ones(12)
    for value in (rows["seen"], rows["told"]):
        torch.testing.assert_close(value.norm(dim=1).detach(), norm)
        assert (value >= 0).all()


def test_what_is_learnt_from_is_distorted_anew_in_each_epoch():
    model, data = build(), batch()
    view = model.view(data, CTX)
    assert (view - data["image2"].float() / 255).abs().mean() > 0.01
    assert not torch.equal(view, model.view(data | {"epoch": data["epoch"] + 1}, CTX))
    torch.testing.assert_close(model.view({name: x[3:4] for name, x in data.items()}, CTX)[0], view[3])
    plain = build(colour={"jitter": 0.0, "grey": 0.0, "blur": 0.0}).view(data, CTX)
    torch.testing.assert_close(plain, data["image2"].float() / 255)


def test_images_as_they_are_do_not_enter_the_running_statistics(lone_group):
    model = build()
    model.embed(batch(), CTX)
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, GlobalBatchNorm)}
    assert counts == {1}


def test_the_head_is_the_authors():
    head = build().head
    kinds = [nn.Linear, GlobalBatchNorm, nn.ReLU, nn.Linear, GlobalBatchNorm, nn.ReLU, nn.Linear, GlobalBatchNorm]
    assert [type(m) for m in head] == kinds
    assert all(torch.equal(head[i].weight.detach(), torch.eye(4)) for i in (3, 6))


def test_a_lower_threshold_above_the_upper_one_is_refused():
    with pytest.raises(ValidationError, match=r"'lower' is 0\.9 and 'upper' 0\.5; the lower one must be smaller"):
        Config(upper=0.5, lower=0.9)
