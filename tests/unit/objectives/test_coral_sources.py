"""CORAL between sources against DomainBed's code, written out."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.core.batch import batch_of
from tests.unit.objectives.adaptation import CTX, LABELS, VIT, batch, build, gradients


def domainbed_coral(features):
    """``CORAL.update`` of DomainBed: the penalty of several domains' features."""

    def distance(x, y):
        mean_x, mean_y = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
        cov_x, cov_y = ((z - m).T @ (z - m) / (len(z) - 1) for z, m in ((x, mean_x), (y, mean_y)))
        return (mean_x - mean_y).pow(2).mean() + (cov_x - cov_y).pow(2).mean()

    pairs = [(i, j) for i in range(len(features)) for j in range(i + 1, len(features))]
    return sum(distance(features[i], features[j]) for i, j in pairs) / len(pairs)


def test_coral_between_sources_is_domainbeds():
    objective = build("coral_sources", weight=1.7, **VIT)
    output = objective(batch(), CTX)
    features, logits = objective.seen(batch()["image"], batch_of(batch()), CTX)
    penalty = domainbed_coral([features[:3], features[3:]])
    expected = functional.cross_entropy(logits, LABELS) + 1.7 * penalty
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(objective, output.loss), gradients(objective, expected), rtol=1e-4, atol=1e-6)
