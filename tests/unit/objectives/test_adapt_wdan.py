"""WDAN: classes weighted by what the target is taken for."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.protocols import SetFacts
from pipeline.nn.adaptation.mmd import mmd
from tests.unit.objectives.adaptation import CLASSES, CTX, LABELS, VIT, at, batch, build, facts, gradients, seen


def test_wdan_weighs_classes_by_what_the_target_is_taken_for():
    settings = {"layers": ["features"], "pseudo_weight": 0.3, "weight": 2.0, "shares": {"since": 0.4}}
    objective = build("adapt_wdan", **settings, **VIT)
    objective.shares.counts.copy_(torch.tensor([10.0, 30, 40, 20]))
    rows = {"answer": functional.one_hot(torch.tensor([0, 0, 0, 2, 2, 3]), 4).float(), "id": torch.arange(6)}
    objective.surveyed("shares.target", rows, at(0.3))  # too early: nobody asks an untrained model
    assert torch.equal(objective.shares.target, torch.full((4,), 0.25))
    objective.surveyed("shares.target", rows, at(0.5))
    torch.testing.assert_close(objective.shares.target, torch.tensor([3.0, 0, 2, 1]) / 6)
    output = objective(batch(), at(0.5))
    (fs, ls), (ft, lt) = seen(objective, batch())
    counts = torch.tensor([10.0, 30, 40, 20]) + torch.tensor([2.0, 2, 1, 1])
    weights = (torch.tensor([3.0, 0, 2, 1]) / 6) / (counts / counts.sum())
    pseudo = functional.cross_entropy(lt, lt.argmax(1))
    expected = functional.cross_entropy(ls, LABELS) + 2 * mmd(fs, ft, weights=weights[LABELS]) + 0.3 * pseudo
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(objective, output.loss), gradients(objective, expected), rtol=1e-4, atol=1e-6)
    objective.after_step(CTX.clock)
    torch.testing.assert_close(objective.shares.counts, counts)
    early = objective(batch(), at(0.2)).loss
    torch.testing.assert_close(early, functional.cross_entropy(ls, LABELS) + 2 * mmd(fs, ft))
    with pytest.raises(ValidationError, match="needs all pairs"):
        build("adapt_wdan", estimator="linear", **VIT)


def test_shares_are_of_the_target_that_is_adapted_to():
    known = facts(second=SetFacts(50, CLASSES, ("x",), 150))
    objective = build("adapt_wdan", known, targets=["target", "second"], shares={"since": 0.0, "every": "2ep"}, **VIT)
    assert {n: (s.data, str(s.every)) for n, s in objective.surveys().items()} == {
        "shares.target": ("target", "2ep"),
        "shares.second": ("second", "2ep"),
    }
    ones = {"answer": torch.eye(4)[[1, 1]], "id": torch.arange(2)}
    objective.surveyed("shares.target", ones, at(0.7))
    assert torch.equal(objective.shares.target, torch.full((4,), 0.25))
    objective.surveyed("shares.second", ones, at(0.7))
    assert torch.equal(objective.shares.target, torch.tensor([0.0, 1, 0, 0]))


def test_a_class_that_the_target_lacks_or_the_source_has_not_shown_has_no_weight():
    objective = build("adapt_wdan", shares={"since": 0.0}, **VIT)
    objective.shares.target.copy_(torch.tensor([0.5, 0.5, 0, 0]))
    ratios = objective.shares.ratios(torch.tensor([3.0, 0, 1, 0]))
    torch.testing.assert_close(ratios, torch.tensor([0.5 / 0.75, 0, 0, 0]))
    few = batch() | {
        "label": torch.tensor([2, 2, 3, 3, 2, 3])
    }  # of classes that the target has not: nothing to compare
    output = objective(few, CTX)
    assert output.loss.isfinite() and output.metrics["mmd_features"] == 0
