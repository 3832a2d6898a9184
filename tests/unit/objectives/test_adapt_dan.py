"""DAN: cross-entropy and the discrepancy of each layer."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.nn.adaptation.mmd import mmd
from pipeline.nn.adaptation.moments import coral, moments
from tests.unit.objectives.adaptation import CTX, LABELS, VIT, at, batch, build, gradients, seen


def ragged(source, target, bandwidths):
    """The unbiased MMD of unequally many rows."""
    both = torch.cat([source, target]).detach()
    sigma = (both[:, None] - both[None]).square().sum(2).mean()

    def mean(x, y, same):
        distances = (x[:, None] - y[None]).square().sum(2)
        k = sum((-distances / (2 * b * sigma)).exp() for b in bandwidths)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1)) if same else k.mean()

    return mean(source, source, True) + mean(target, target, True) - 2 * mean(source, target, False)


def test_dan_is_cross_entropy_and_the_discrepancy_of_each_layer():
    objective = build("adapt_dan", weight=[[0.0, 0.0], [1.0, 4.0]], bandwidths=[0.5, 2.0], **VIT)
    output = objective(batch(), at(0.5))
    (fs, ls), (ft, lt) = seen(objective, batch())
    parts = [mmd(fs, ft, bandwidths=(0.5, 2.0)), mmd(ls, lt, bandwidths=(0.5, 2.0))]
    expected = functional.cross_entropy(ls, LABELS) + 2 * sum(parts)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.metrics["mmd_logits"], parts[1].detach())
    wanted = gradients(objective, expected)
    torch.testing.assert_close(gradients(objective, output.loss), wanted, rtol=1e-4, atol=1e-6)


def test_each_source_may_stand_against_the_target_by_itself():
    first = slice(0, 3)  # the samples of the first source
    for name, distance in (("adapt_dan", mmd), ("adapt_coral", lambda s, t: coral(moments(s), moments(t)))):
        settings = {"layers": ["features"], "per_source": True, "weight": 3.0}
        objective = build(name, **settings, **VIT)
        output = objective(batch(), CTX)
        (fs, ls), (ft, _) = seen(objective, batch())
        if name == "adapt_dan":  # the bandwidth is that of the whole batch, so only the value without it is plain
            both = torch.cat([fs, ft]).detach()
            spread = 2 * both.var(0, correction=0).sum()
            parts = []
            for rows in (first, slice(3, 6)):
                own = 2 * torch.cat([fs[rows], ft]).detach().var(0, correction=0).sum()
                scaled = [b * (spread / own).item() for b in (0.125, 0.25, 0.5, 1.0, 2.0)]
                parts.append(ragged(fs[rows], ft, scaled))
        else:
            parts = [distance(fs[rows], ft) for rows in (first, slice(3, 6))]
        expected = functional.cross_entropy(ls, LABELS) + 3 * sum(parts) / 2
        torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValidationError, match="per_source needs all pairs"):
        build("adapt_dan", per_source=True, estimator="linear", **VIT)
