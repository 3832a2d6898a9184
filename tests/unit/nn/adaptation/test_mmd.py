"""The discrepancy against plain matrices, Gaussians whose discrepancy is known, and what duplicates say of weights."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.nn.adaptation.mmd import BANDWIDTHS, mmd

UNEVEN = (0.3, 1.0, 1.7)
"""Bandwidths that are no halves of each other."""


def draws(n=7, width=3, shift=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return source.requires_grad_(), (target * 1.3 + shift).requires_grad_()


def kernel(x, y, sigma, bandwidths):
    distances = (x[:, None] - y[None]).square().sum(2)
    return sum((-distances / (2 * b * sigma)).exp() for b in bandwidths)


def plain(source, target, weights=None, bandwidths=BANDWIDTHS, unbiased=True):
    """|sum w phi(s) - mean phi(t)|^2, written out; the bandwidth is a constant."""
    both = torch.cat([source, target]).detach()
    sigma = (both[:, None] - both[None]).square().sum(2).mean()
    w = torch.ones(len(source), dtype=source.dtype) if weights is None else weights
    w = w / w.sum()
    v = torch.full((len(target),), 1 / len(target), dtype=source.dtype)
    value = -2 * w @ kernel(source, target, sigma, bandwidths) @ v
    for weight, rows in ((w, source), (v, target)):
        pairs = weight[:, None] * weight[None] * kernel(rows, rows, sigma, bandwidths)
        if unbiased:
            off = 1 - torch.eye(len(rows), dtype=rows.dtype)
            value = value + (pairs * off).sum() / (weight[:, None] * weight[None] * off).sum()
        else:
            value = value + pairs.sum()
    return value


@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, UNEVEN])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_value_and_gradient_are_those_of_the_whole_matrices(estimator, weighted, bandwidths):
    source, target = draws()
    weights = torch.tensor([0.0, 1, 2, 0.5, 3, 1, 1], dtype=torch.float64) if weighted else None
    expected = plain(source, target, weights, bandwidths, estimator == "unbiased")
    wanted = torch.autograd.grad(3 * expected, (source, target))
    for tile in (None, 2, 5):
        found = mmd(source, target, weights=weights, bandwidths=bandwidths, estimator=estimator, tile=tile)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(3 * found, (source, target)), wanted, rtol=1e-10, atol=1e-13)


def test_it_is_that_of_known_gaussians():
    """k(x, y) of two normals with unit covariance has the mean (s / (s + 2))^(d/2) exp(-|m|^2 / (2 (s + 2)))."""
    width, shift, many = 3, 0.8, 3000
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, many, width, generator=generator)
    found = mmd(source, target + shift).item()
    sigma, away = 2 * (width + width * shift**2 / 4), width * shift**2
    expected = 0.0
    for s in (b * sigma for b in BANDWIDTHS):
        expected += 2 * (s / (s + 2)) ** (width / 2) * (1 - math.exp(-away / (2 * (s + 2))))
    assert found == pytest.approx(expected, rel=0.05)
    # Of one distribution it is about zero, on either side of it.
    assert abs(mmd(source, target).item()) < 0.02 * expected


def test_without_bias_it_is_zero_on_average_and_may_be_negative():
    estimates = {estimator: [] for estimator in ("unbiased", "biased", "linear")}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        source, target = torch.randn(2, 6, 2, generator=generator)
        for estimator, found in estimates.items():
            found.append(mmd(source, target, estimator=estimator).item())
    means = {name: sum(found) / len(found) for name, found in estimates.items()}
    assert min(estimates["unbiased"]) < 0 and min(estimates["biased"]) > 0
    assert abs(means["unbiased"]) < 0.05 and abs(means["linear"]) < 0.1 and means["biased"] > 0.5


def test_a_whole_weight_is_a_sample_that_comes_so_often():
    source, target = draws(5)
    weights = torch.tensor([1.0, 3, 2, 1, 0])
    often = source[torch.tensor([0, 1, 1, 1, 2, 2, 3])]
    target = torch.cat([target, target[:2]])
    # The bandwidth is that of all samples, weighted or not; with one of its own each, the values differ a little.
    sigma = (
        torch.cat([source, target[:5]]).var(0, correction=0).sum()
        / torch.cat([often, target]).var(0, correction=0).sum()
    )
    repeated = mmd(often, target, estimator="biased", bandwidths=(sigma.item(),))
    w = weights.double() / weights.sum()
    both = torch.cat([source, target[:5]]).detach()
    s = (both[:, None] - both[None]).square().sum(2).mean()
    v = torch.tensor([2.0, 2, 1, 1, 1], dtype=torch.float64) / 7
    own = target[:5]
    value = w @ kernel(source, source, s, (1,)) @ w + v @ kernel(own, own, s, (1,)) @ v
    value = value - 2 * w @ kernel(source, own, s, (1,)) @ v
    torch.testing.assert_close(repeated, value)


def test_the_linear_one_compares_neighbours_on_a_ring_and_nothing_else():
    source, target = draws()
    found = mmd(source, target, estimator="linear")
    both = torch.cat([source, target]).detach()
    sigma = (both[:, None] - both[None]).square().sum(2).mean()
    expected = 0
    for i in range(len(source)):
        j = (i + 1) % len(source)
        pairs = [(source[i], source[j], 1), (target[i], target[j], 1), (source[i], target[j], -1)]
        for x, y, sign in [*pairs, (source[j], target[i], -1)]:
            expected = expected + sign * kernel(x[None], y[None], sigma, BANDWIDTHS).squeeze() / len(source)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (source, target))
    torch.testing.assert_close(torch.autograd.grad(found, (source, target)), wanted)


def test_features_far_from_the_origin_and_half_precision_spoil_nothing():
    source, target = (x.detach().float() for x in draws(64, 16))
    expected = mmd(source.double(), target.double()).float()
    torch.testing.assert_close(mmd(source + 1000, target + 1000), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mmd(source, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear"])
def test_features_that_are_all_the_same_have_no_discrepancy_and_a_finite_gradient(estimator):
    source, target = (torch.ones(4, 3, requires_grad=True) for _ in range(2))
    found = mmd(source, target, estimator=estimator)
    assert found.item() == pytest.approx(0, abs=1e-5)
    found.backward()
    assert source.grad.isfinite().all() and target.grad.isfinite().all()


def test_where_weights_leave_no_two_samples_nothing_is_compared():
    source, target = draws(4)
    for weights in (torch.zeros(4), torch.tensor([0.0, 1, 0, 0])):
        found = mmd(source, target, weights=weights)
        assert found.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(found, (source, target)))


def test_a_batch_of_one_is_refused_where_samples_of_a_domain_are_compared():
    one = torch.zeros(1, 3)
    for estimator in ("unbiased", "linear"):
        with pytest.raises(ConfigError, match=r"the global batch has one of each; raise run\.global_batch"):
            mmd(one, one, estimator=estimator)
    assert mmd(one, one + 1, estimator="biased").isfinite()
    with pytest.raises(ConfigError, match="knows no weights"):
        mmd(torch.zeros(2, 3), torch.zeros(2, 3), weights=torch.ones(2), estimator="linear")
