"""Likelihoods of pixels against SciPy, sums over all values, and the relation of both kinds."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.nn.generative import pixels

VALUES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -2.0), (-0.97, -4.0), (0.4, 0.5), (1.3, -6.0)])
def test_the_logistic_is_scipys_and_sums_to_one(mean, log_scale):
    k = VALUES.double() / 127.5 - 1
    found = pixels.logistic(k, torch.tensor(mean).double(), torch.tensor(log_scale).double())
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)
    law = stats.logistic(mean, math.exp(log_scale))
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    # differences of both tails: each is exact on one side
    left, right = np.diff(law.cdf(edges)), -np.diff(law.sf(edges))
    expected = np.where(k.numpy() < mean, left, right)
    likely = expected > 1e-200
    np.testing.assert_allclose(found.numpy()[likely], np.log(expected[likely]), rtol=1e-6, atol=1e-9)
    assert found.isfinite().all()


def test_an_improbable_value_keeps_its_gradient():
    mean = torch.tensor(-0.9, requires_grad=True)
    pixels.logistic(torch.tensor(0.9), mean, torch.tensor(-7.0)).backward()
    assert mean.grad == pytest.approx(math.exp(7.0), rel=1e-3)


def test_values_come_back_from_anywhere_in_their_bin():
    image = VALUES.view(1, 1, 16, 16)
    for u in (0.0, 0.5, 1 - 2.0**-16):
        x = pixels.dequantise(image, torch.full(image.shape, u))
        assert float(x.min()) >= -1 and float(x.max()) < 1
        assert torch.equal(pixels.quantise(x), image)
    assert pixels.quantise(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_uniform_density_takes_eight_bits():
    """Of all values alike, on the scale from -1 to 1: density 1/2 at each of D places."""
    density = torch.full((1,), 12 * math.log(0.5))
    assert pixels.bits_of_density(density, 12).tolist() == pytest.approx([8.0])
    assert pixels.bits(torch.full((1,), -12 * math.log(256)), 12).tolist() == pytest.approx([8.0])


def test_a_density_of_dequantised_values_bounds_their_probability():
    """Theis et al.: never fewer bits than what the same density gives the whole bin."""
    k = torch.randint(0, 256, (1, 1, 50, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = 0.1, 0.4
    u = torch.linspace(0, 1, 401)[:-1] + 1 / 800
    x = (k.double()[..., None] + u) / 128 - 1
    density = pixels.normal(x, torch.tensor(mean).double(), torch.tensor(math.log(std)).double()).mean(dim=-1)
    law = stats.norm(mean, std)
    inside = law.cdf((k.numpy() + 1.0) / 128 - 1) - law.cdf(k.numpy() / 128.0 - 1)
    bound = pixels.bits_of_density(density.flatten(1).sum(dim=1), 2500)
    exact = -np.log2(inside).mean()
    assert exact < float(bound) < exact + 1e-3


def test_however_wide_a_logistic_is_its_gradient_is_finite():
    """Of the widest, bins are as likely as the density says: 2 half_bin / (4 scale) at the mean."""
    log_scale = torch.tensor([-7.0, -3.0, 3.0, 20.0, 60.0, 100.0, 1e4], requires_grad=True)
    image, mean = torch.tensor([-1.0, 0.2, 1.0])[:, None], torch.zeros(1, requires_grad=True)
    found = pixels.logistic(image, mean, log_scale)
    found.sum().backward()
    assert found.isfinite().all() and log_scale.grad.isfinite().all() and mean.grad.isfinite().all()
    expected = math.log(2 / 255 / 4) - log_scale.detach()[3:]
    torch.testing.assert_close(found.detach()[1, 3:], expected, rtol=1e-5, atol=0)
    exact = torch.tensor(1e-4 * 0.999), torch.tensor(1e-4 * 1.001)
    for width in exact:  # on both sides of where the formula changes
        narrow = torch.log(255 / 2 * width.double())
        own = pixels.logistic(torch.zeros(1).double(), torch.zeros(1).double(), -narrow)
        half = width.double() / 2
        known = torch.log(torch.sigmoid(half) - torch.sigmoid(-half))
        torch.testing.assert_close(own[0], known, rtol=1e-8, atol=0)
