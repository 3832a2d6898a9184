"""Group DRO against DomainBed's code, written out."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.core.batch import batch_of
from tests.unit.objectives.adaptation import CTX, LABELS, VIT, batch, build, gradients, images


def domainbed_group_dro(losses, domain, weights, rate):
    """``GroupDRO.update`` of DomainBed, from the losses of its minibatches on."""
    means = torch.stack([losses[domain == m].mean() for m in range(len(weights))])
    q = weights * (rate * means.detach()).exp()
    q = q / q.sum()
    return means @ q, q


def test_group_dro_is_domainbeds_step_after_step():
    objective = build("group_dro", rate=0.7, head_std=1.0, **VIT)
    domain, weights = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.5, 0.5])
    for step in range(3):
        whole = batch() | {"image": images(6, step)}
        output = objective(whole, CTX)
        logits = objective.seen(whole["image"], batch_of(whole), CTX)[1]
        losses = functional.cross_entropy(logits, LABELS, reduction="none")
        expected, weights = domainbed_group_dro(losses, domain, weights, 0.7)
        torch.testing.assert_close(output.loss, expected)
        wanted = gradients(objective, expected)
        torch.testing.assert_close(gradients(objective, output.loss), wanted, rtol=1e-4, atol=1e-6)
        assert output.metrics["worst_domain"] == torch.stack([losses[:3].mean(), losses[3:].mean()]).max()
        objective.after_step(CTX.clock)
        torch.testing.assert_close(objective.weights, weights)
    assert (objective.weights - 0.5).abs().max() > 0.01
