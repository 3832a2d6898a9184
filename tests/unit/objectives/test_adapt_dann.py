"""DANN: reversal, several sources, and class weights, written out."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.unit.objectives.adaptation import CTX, LABELS, VIT, at, batch, build, gradients, seen


def test_dann_reverses_the_critics_gradient_before_the_features_alone():
    objective = build("adapt_dann", weight=0.7, critic={"hidden": [5]}, **VIT)
    output = objective(batch(), at(0.3))
    (fs, ls), (ft, _) = seen(objective, batch())
    truth = torch.tensor([1.0] * 6 + [0.0] * 6)
    critic = functional.binary_cross_entropy_with_logits(objective.critic(torch.cat([fs, ft]))[:, 0], truth)
    classification = functional.cross_entropy(ls, LABELS)
    torch.testing.assert_close(output.loss, classification + 0.7 * critic)
    factor = 2 / (1 + torch.tensor(-10 * 0.3).exp()) - 1
    plain, own = gradients(objective, classification), gradients(objective, critic)
    for name, found in gradients(objective, output.loss).items():
        sign = 0.7 if name.startswith("critic.") else -0.7 * factor
        expected = (plain.get(name, torch.zeros(())) + sign * own.get(name, torch.zeros(()))).expand_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dann_may_tell_each_source_apart():
    objective = build("adapt_dann", per_source=True, critic={"hidden": [5]}, **VIT)
    output = objective(batch(), CTX)
    (fs, ls), (ft, _) = seen(objective, batch())
    truth = torch.tensor([0, 0, 0, 1, 1, 1] + [2] * 6)
    critic = functional.cross_entropy(objective.critic(torch.cat([fs, ft])), truth)
    torch.testing.assert_close(output.loss, functional.cross_entropy(ls, LABELS) + critic)


def test_classes_that_the_target_lacks_count_less_for_classifier_and_critic():
    """PADA: both losses of a source sample times the class's share in the target over the largest one."""
    objective = build("adapt_dann", class_weights={"since": 0.0}, critic={"hidden": [5]}, **VIT)
    answers = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.3, 0.5, 0.2, 0.0]])
    objective.surveyed("shares.target", {"answer": answers, "id": torch.arange(2)}, CTX)
    output = objective(batch(), CTX)
    (fs, ls), (ft, _) = seen(objective, batch())
    weights = torch.tensor([0.4, 0.5, 0.1, 0.0])[LABELS] / 0.5
    says = objective.critic(torch.cat([fs, ft]))[:, 0]
    critic = (weights * functional.softplus(-says[:6])).mean() / 2 + functional.softplus(says[6:]).mean() / 2
    expected = (weights * functional.cross_entropy(ls, LABELS, reduction="none")).mean() + critic
    torch.testing.assert_close(output.loss, expected)
    assert build("adapt_dann", **VIT).surveys() == {}
