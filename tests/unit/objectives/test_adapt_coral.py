"""Deep CORAL: cross-entropy and the distance of covariances."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.unit.objectives.adaptation import CTX, LABELS, VIT, batch, build, gradients, seen


def test_it_is_cross_entropy_and_the_distance_of_covariances_of_each_layer():
    objective = build("adapt_coral", layers=["features", "logits"], weight=5.0, **VIT)
    output = objective(batch(), CTX)
    (fs, ls), (ft, lt) = seen(objective, batch())
    parts = [(torch.cov(s.T) - torch.cov(t.T)).square().sum() / (4 * s.shape[1] ** 2) for s, t in ((fs, ft), (ls, lt))]
    expected = functional.cross_entropy(ls, LABELS) + 5 * sum(parts)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.metrics["coral_logits"], parts[1].detach())
    torch.testing.assert_close(gradients(objective, output.loss), gradients(objective, expected), rtol=1e-4, atol=1e-6)
