"""Means, covariances and the distances of CORAL."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.nn.adaptation.moments import coral, moment_distance, moments


def draws(n=9, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64, requires_grad=True)


def test_covariances_are_numpys_and_a_whole_weight_is_a_sample_that_comes_so_often():
    x = draws()
    found = moments(x)
    np.testing.assert_allclose(found.covariance.detach(), np.cov(x.detach().numpy().T))
    np.testing.assert_allclose(found.mean.detach(), x.detach().numpy().mean(0))
    weights = torch.tensor([0.0, 1, 0.5, 2, 1, 1, 0.1, 3, 1])
    weighted = moments(x, weights)
    expected = np.cov(x.detach().numpy().T, aweights=weights.double().numpy())
    np.testing.assert_allclose(weighted.covariance.detach(), expected, rtol=1e-6)
    some = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1])
    alone = moments(x[some > 0])
    torch.testing.assert_close(moments(x, some).covariance, alone.covariance)
    torch.testing.assert_close(moments(x, some).mean, alone.mean)


def test_coral_is_the_papers_formula_and_its_gradient_that_of_finite_differences():
    """C = (D^T D - (1^T D)^T (1^T D) / n) / (n - 1), as equations 2 and 3 write it."""
    source, target = draws(6), draws(11, seed=1)

    def covariance(x):
        ones = torch.ones(1, len(x), dtype=x.dtype)
        return (x.T @ x - (ones @ x).T @ (ones @ x) / len(x)) / (len(x) - 1)

    width = source.shape[1]
    expected = (covariance(source) - covariance(target)).square().sum() / (4 * width**2)
    torch.testing.assert_close(coral(moments(source), moments(target)), expected)
    assert torch.autograd.gradcheck(lambda s, t: coral(moments(s), moments(t)), (source, target))
    assert torch.autograd.gradcheck(lambda s, t: moment_distance(moments(s), moments(t)), (source, target))


def test_of_known_gaussians_it_is_the_difference_of_their_covariances():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 20000, 3, generator=generator)
    found = coral(moments(source * 2), moments(target + 5))
    assert found.item() == pytest.approx(3 * 3**2 / (4 * 9), rel=0.05)  # |4 I - I|^2 / (4 d^2), whatever the means
    apart = moment_distance(moments(source * 2), moments(target + 5))
    assert apart.item() == pytest.approx(5**2 + 3 * 3**2 / 9, rel=0.05)


def test_what_has_no_two_samples_is_not_known_and_a_batch_of_one_is_refused():
    x = draws(4)
    for weights in (torch.zeros(4), torch.tensor([0.0, 2, 0, 0])):
        one = moments(x, weights)
        assert one.known.item() == 0 and one.covariance.isfinite().all()
        assert coral(one, moments(x)).item() == 0 == moment_distance(one, moments(x)).item()
    with pytest.raises(ConfigError, match=r"the global batch has one; raise run\.global_batch"):
        moments(x[:1])
