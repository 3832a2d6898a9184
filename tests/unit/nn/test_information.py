"""Scores of answers without labels: closed forms, and plain transcriptions."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from pipeline.nn.adaptation import information
from pipeline.nn.adaptation.information import (
    batch_nuclear_norm,
    diversity,
    entropy,
    soft_neighbourhood_density,
)


def answers(n=40, k=6, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_entropy_and_diversity_are_scipys_and_survive_sure_answers():
    logits = answers()
    p = softmax(logits.numpy(), axis=1)
    assert entropy(logits).numpy() == pytest.approx(scipy_entropy(p, axis=1), rel=1e-12)
    assert float(diversity(torch.from_numpy(p.mean(axis=0)))) == pytest.approx(scipy_entropy(p.mean(axis=0)), rel=1e-12)
    sure = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    entropy(sure).sum().backward()
    assert sure.grad is not None and sure.grad.isfinite().all()
    assert float(diversity(torch.tensor([1.0, 0.0]))) == 0
    assert float(diversity(torch.full((8,), 1 / 8))) == pytest.approx(math.log(8))


def test_gradient_of_the_entropy_by_differences():
    logits = answers(5, 4).requires_grad_(True)
    assert torch.autograd.gradcheck(entropy, logits)


def test_nuclear_norm_of_answers_that_are_known():
    """Sure and even: N/K samples of each class, K singular values of sqrt(N/K). All alike: one, of sqrt(N)."""
    even = torch.eye(4, dtype=torch.float64).repeat(6, 1)
    assert float(batch_nuclear_norm(even)) == pytest.approx(1.0)
    collapsed = torch.zeros(24, 4, dtype=torch.float64)
    collapsed[:, 1] = 1
    assert float(batch_nuclear_norm(collapsed)) == pytest.approx(1 / math.sqrt(4))
    p = torch.from_numpy(softmax(answers().numpy(), axis=1))
    assert float(batch_nuclear_norm(p)) == pytest.approx(np.linalg.norm(p.numpy(), "nuc") / math.sqrt(40 * 6))
    wide = torch.eye(8, dtype=torch.float64)[:3]
    assert float(batch_nuclear_norm(wide)) == pytest.approx(1.0)


def density_by_hand(p, temperature):
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    found = []
    for i in range(len(p)):
        others = np.array([unit[i] @ unit[j] for j in range(len(p)) if j != i])
        found.append(scipy_entropy(softmax(others / temperature)))
    return np.mean(found)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("chunk", [2**22, 100])
def test_density_is_the_mean_entropy_of_similarities_to_the_others(temperature, chunk, monkeypatch):
    monkeypatch.setattr(information, "CHUNK", chunk)
    p = torch.from_numpy(softmax(answers().numpy(), axis=1))
    found = float(soft_neighbourhood_density(p, temperature))
    assert found == pytest.approx(density_by_hand(p.numpy(), temperature), rel=1e-9)


def test_density_of_equal_answers_is_that_of_a_uniform_choice():
    assert float(soft_neighbourhood_density(torch.full((9, 3), 1 / 3))) == pytest.approx(math.log(8), rel=1e-5)
