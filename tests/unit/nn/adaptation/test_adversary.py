"""Gradient reversal and critics."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.nn.adaptation.adversary import CriticConfig, critic, reversal_at, reverse_gradient
from pipeline.nn.batch_norm import GlobalBatchNorm


def test_the_gradient_is_minus_lambda_times_what_comes_and_the_value_is_left_alone():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for factor in (0.0, 0.3, 2.0):
        y = reverse_gradient(x, factor)
        assert torch.equal(y, x)
        (reversed_,) = torch.autograd.grad(y.pow(3).sum(), x)
        torch.testing.assert_close(reversed_, -factor * 3 * x.detach().square())


def test_lambda_rises_from_nought_to_one_as_the_paper_has_it():
    assert reversal_at(0.0) == 0.0
    for progress in (0.1, 0.5, 1.0):
        assert reversal_at(progress) == pytest.approx(math.tanh(10 * progress / 2))
    assert reversal_at(0.5, steepness=2.0) == pytest.approx(math.tanh(0.5))


def test_a_critic_is_as_deep_and_wide_as_it_is_told():
    built = critic(7, 3, CriticConfig(hidden=(5, 4), norm=True, dropout=0.5))
    shapes = [tuple(layer.weight.shape) for layer in built if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(5, 7), (4, 5), (3, 4)]
    assert sum(isinstance(layer, GlobalBatchNorm) for layer in built) == 2
    assert built.eval()(torch.zeros(2, 7)).shape == (2, 3)
    assert [type(layer).__name__ for layer in critic(7, 1, CriticConfig(hidden=()))] == ["Linear"]
