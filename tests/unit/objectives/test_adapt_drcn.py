"""DRCN: classes of the source and pixels of the target."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.core.batch import batch_of
from tests.unit.objectives.adaptation import CTX, LABELS, VIT, at, batch, build, gradients


def test_drcn_shares_its_weight_between_classes_and_pixels_of_undamaged_targets():
    objective = build("adapt_drcn", balance=0.6, corruption={"pixels": 0.5}, **VIT)
    output = objective(batch(), CTX)
    target = batch_of(batch(), "target")
    damaged = objective.target_image(target, CTX)
    whole = objective.encoder.normalize(target["image"])
    kept = (damaged == whole).all(1)
    assert 0.35 < kept.float().mean() < 0.65 and not damaged[~kept.unsqueeze(1).expand_as(damaged)].any()
    made = objective.decoder(objective.answer(damaged).features)
    _, ls = objective.seen(batch()["image"], batch_of(batch()), CTX)
    pixels = (made - target["image"] / 255).square().mean()
    torch.testing.assert_close(output.loss, 0.6 * functional.cross_entropy(ls, LABELS) + 0.4 * pixels)
    reached = gradients(objective, output.loss)
    assert any(name.startswith("decoder.") for name in reached) and any(n.startswith("encoder.") for n in reached)
    still = at(0.5, training=False)
    assert torch.equal(objective.target_image(target, still), whole)
