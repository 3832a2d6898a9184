"""AaD: its loss against a transcription that renews its bank in place, as the authors' code does."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, Embeddings, StepContext
from pipeline.objectives.adapt_neighbours import AdaptNeighbours, Config

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SAMPLES, CLASSES = 30, 5


def build(samples=SAMPLES, **settings):
    torch.manual_seed(0)
    settings = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "head_std": 0.5} | settings
    names = tuple(f"c{i}" for i in range(CLASSES))
    return AdaptNeighbours(Config(**settings), DataFacts((32, 32), names, samples=samples))


def rows(ids, seed=2):
    generator = torch.Generator().manual_seed(seed)
    feature = functional.normalize(torch.randn(len(ids), 16, generator=generator), dim=1)
    logits = torch.randn(len(ids), CLASSES, generator=generator, requires_grad=True)
    return {"id": torch.tensor(ids), "feature": feature, "answer": logits.softmax(dim=1)}, logits


def fill(model, seed=9):
    every = rows(list(range(SAMPLES)), seed)[0]
    model.surveyed("bank", {name: value.detach() for name, value in every.items()}, None)


def by_hand(model, found, weight, k):
    """Entry by entry: the bank takes the batch in, then neighbours are looked up, the sample itself left out."""
    bank, answers = model.bank.clone(), model.answers.clone()
    for row, number in enumerate(found["id"].tolist()):
        bank[number], answers[number] = found["feature"][row], found["answer"][row].detach()
    total = found["answer"].new_zeros(())
    for row, number in enumerate(found["id"].tolist()):
        others = [j for j in range(SAMPLES) if j != number]
        nearest = sorted(others, key=lambda j: -float(found["feature"][row] @ bank[j]))[:k]
        p = found["answer"][row]
        total = total - sum((answers[j] * p).sum() for j in nearest)
        total = total + weight * sum((p * q).sum() for other, q in enumerate(found["answer"]) if other != row)
    return total / len(found["id"])


@pytest.mark.parametrize(("step", "k"), [(0, 3), (40, 5)])
def test_loss_and_gradient_by_hand(step, k, lone_group):
    model = build(neighbours=k, dispersion=0.7, decay=2.0)
    fill(model)
    found, logits = rows([3, 8, 9, 21, 4, 17])
    out = model.loss(Embeddings(found, {}), StepContext(1, Clock(step, step, 100)))
    expected = by_hand(model, found, 0.7 * (1 + 10 * step / 100) ** -2.0, k)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (own,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (other,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


def test_the_bank_is_renewed_once_and_after_the_update(lone_group):
    model = build()
    fill(model)
    before = model.bank.clone(), model.answers.clone()
    found, _ = rows([5, 29])
    ctx = StepContext(1, Clock(0, 0, 100))
    model.loss(Embeddings(found, {}), ctx)
    assert torch.equal(model.bank, before[0]) and torch.equal(model.answers, before[1])
    model.after_step(ctx.clock)
    assert torch.equal(model.bank[[5, 29]], found["feature"]) and torch.equal(model.answers[[5, 29]], found["answer"])
    rest = [i for i in range(SAMPLES) if i not in (5, 29)]
    assert torch.equal(model.bank[rest], before[0][rest])


def test_the_survey_fills_by_id_with_unit_features(lone_group):
    model = build().eval()
    ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    image = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8)
    ctx = StepContext(1, Clock(0, 0, 100), training=False)
    with torch.no_grad():
        seen = model.look("bank", {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}, ctx)
        model.surveyed("bank", seen | {"id": ids}, ctx)
        feature = functional.normalize(model.encoder(image), dim=1)
        answer = model.head(model.encoder(image)).softmax(dim=1)
    torch.testing.assert_close(model.bank[ids], feature)
    torch.testing.assert_close(model.answers[ids], answer)
    assert np.allclose(model.bank.norm(dim=1), 1, atol=1e-6)


def test_the_classifier_is_trained_too(lone_group):
    model = build().train()
    fill(model)
    ids = torch.arange(8)
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    ctx = StepContext(1, Clock(0, 0, 100))
    model({"image": image, "id": ids, "epoch": torch.zeros_like(ids)}, ctx).loss.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_what_cannot_be():
    with pytest.raises(ConfigError, match=r"objective\.neighbours = 5: the data set has 5 samples"):
        build(samples=5)
    with pytest.raises(ValidationError, match="holds no neighbours"):
        build(refresh="0ba")
