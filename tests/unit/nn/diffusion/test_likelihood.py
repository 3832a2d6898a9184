import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import likelihood

M = 0.3


def bound(levels, s, log_variance):
    """Expected bound on the density of N(M, s^2), in nats: expectations of ``normal_kl`` over image and x, exactly.

    The first level's decoder is the density, not its bins.
    """
    a, sd = levels.a, levels.s
    v = a**2 * s**2 + sd**2
    error = s**2 * sd**2 / v  # E|image - denoised|^2
    gap = levels.image_part**2 * error
    zero = torch.zeros(1, dtype=torch.float64)
    # normal_kl is quadratic in the gap of the means, so its expectation is its value at the root of the mean square
    kl = likelihood.normal_kl(gap.sqrt(), levels.log_small, zero, log_variance)[1:].sum()
    decoder = 0.5 * (math.log(2 * math.pi) + log_variance[0] + gap[0] / log_variance[0].exp())
    moment = a[-1] ** 2 * (M**2 + s**2)
    prior = likelihood.normal_kl(moment.sqrt(), 2 * sd[-1].log(), zero, zero)
    return float(kl + decoder + prior)


def exact_log_variance(levels, s):
    left = s**2 * levels.s**2 / (levels.a**2 * s**2 + levels.s**2)
    return (levels.variance + levels.image_part**2 * left).log()


@pytest.mark.parametrize(
    ("name", "steps", "s", "expected"),
    [
        ("linear", 1000, 0.25, 0.03264599),
        ("cosine", 1000, 0.25, 0.03264417),
        ("linear", 100, 0.25, 0.03264509),
        ("linear", 1000, 1.0, 1.41894035),
        ("cosine", 1000, 1.0, 1.41893853),
    ],
)
def test_with_the_exact_variance_the_bound_is_the_entropy(name, steps, s, expected):
    """O5: at any number of steps and under any schedule."""
    levels = lv.schedule(name, steps)
    found = bound(levels, s, exact_log_variance(levels, s))
    assert found == pytest.approx(expected, abs=2e-8)
    a, sd = float(levels.a[-1]), float(levels.s[-1])
    v = a**2 * s**2 + sd**2
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2)
    assert found == pytest.approx(entropy + 0.5 * (v + a**2 * M**2 - 1 - math.log(v)), abs=1e-9)


@pytest.mark.parametrize(("kind", "expected"), [("exact", 9.04145), ("small", 9.876), ("large", 9.205)])
def test_the_bound_of_fixed_variances_in_bits(kind, expected):
    levels = lv.schedule("linear", 1000)
    tables = {"exact": exact_log_variance(levels, 1.0), "small": levels.log_small, "large": levels.log_large}
    bits = bound(levels, 1.0, tables[kind]) / math.log(2) + math.log2(127.5)
    assert bits == pytest.approx(expected, abs=6e-4)


def test_terms_of_samples_add_up_to_the_expectation():
    """``term`` and ``prior`` on a grid of quantiles of image and noise, against the closed form above."""
    levels, s, n = lv.schedule("linear", 30), 0.5, 200
    normal = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)
    normal = normal / normal.pow(2).mean().sqrt()
    image, noise = (grid.reshape(-1, 1) for grid in torch.meshgrid(M + s * normal, normal, indexing="ij"))
    log_v = exact_log_variance(levels, s)
    total = float(likelihood.prior(image, levels).mean())
    for i in range(1, 30):
        index = torch.full((n * n,), i)
        level = levels.at(index)
        x = lv.add_noise(image, noise, level)
        predicted = M + (level.a * s**2 / (level.a**2 * s**2 + level.s**2))[:, None] * (x - level.a[:, None] * M)
        total += float(likelihood.term(image, x, levels, index, predicted, log_v[i]).mean())
    gap = levels.image_part[0] ** 2 * s**2 * levels.s[0] ** 2 / (levels.a[0] ** 2 * s**2 + levels.s[0] ** 2)
    decoder = 0.5 * (math.log(2 * math.pi) + log_v[0] + gap / log_v[0].exp())
    assert total == pytest.approx((bound(levels, s, log_v) - float(decoder)) / math.log(2), abs=1e-9)


def test_continuous_limit_is_the_integral_over_snr():
    """O6: half the integral of the squared error over SNR, approached as O(1 / T) on a grid even in log SNR."""
    s, low, high = 0.5, -5.0, 13.3
    expected = 0.5 * math.log((1 + s**2 * math.exp(high)) / (1 + s**2 * math.exp(low)))
    numeric, _ = integrate.quad(lambda z: 0.5 * s**2 / (1 + s**2 * math.exp(z)) * math.exp(z), low, high)
    assert expected == pytest.approx(5.956015, abs=1e-6) == numeric
    for steps, value in ((1000, 6.006237), (10000, 5.961011)):
        levels = lv.Levels(*lv.from_log_snr(torch.linspace(high, low, steps + 1, dtype=torch.float64)))
        error = s**2 * levels.s**2 / (levels.a**2 * s**2 + levels.s**2)
        zero = torch.zeros(1, dtype=torch.float64)
        # as the steps shrink, so does the difference of the variances
        kl = likelihood.normal_kl((levels.image_part**2 * error).sqrt(), levels.log_small, zero, levels.log_small)
        assert float(kl[1:].sum()) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("deviation", [0.002, 0.01, 0.3, 2.0])
def test_bins_are_scipys_and_sum_to_one(deviation):
    k = np.arange(256)
    image = k / 127.5 - 1
    log_v = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    for mean in (-1.0, -0.3, 0.004, 0.9, 1.4):
        found = likelihood.log_bin(torch.from_numpy(image), torch.full((256,), mean, dtype=torch.float64), log_v)
        assert float(found.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)
        edges = np.concatenate([[-np.inf], image[:-1] + 1 / 255, [np.inf]])
        normal = stats.norm(mean, deviation)
        expected = np.where(image > mean, normal.sf(edges[:-1]) - normal.sf(edges[1:]), np.diff(normal.cdf(edges)))
        likely = expected > 1e-250
        np.testing.assert_allclose(found.numpy()[likely], np.log(expected[likely]), rtol=1e-7, atol=1e-12)
        assert found.isfinite().all()  # however improbable: no floor


def test_bins_have_a_gradient_everywhere():
    image = torch.tensor([-1.0, -0.5, 0.0, 1.0], dtype=torch.float64)
    for mean in (-3.0, 0.0, 3.0):
        m = torch.full((4,), mean, dtype=torch.float64, requires_grad=True)
        v = torch.full((4,), -9.0, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda m, v: likelihood.log_bin(image, m, v), (m, v), rtol=1e-4)


def test_prior_of_unit_variance_data():
    image = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)  # mean square 1
    assert float(likelihood.prior(image, lv.schedule("linear", 1000))) == pytest.approx(2.91e-5, rel=2e-3)
