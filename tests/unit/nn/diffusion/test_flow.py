"""Flow matching: the straight line from images to noise, against closed forms and a plain loop (float64)."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import samplers
from pipeline.nn.diffusion import targets as tg
from pipeline.nn.diffusion.process import Straight
from pipeline.nn.diffusion.samplers import Denoised
from tests.unit.nn.diffusion.gaussian import M, S, denoiser

X = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
CENTRES, SHARE, WIDTH = torch.tensor([-0.8, 0.6]).double(), torch.tensor([0.3, 0.7]).double(), 0.2


def expected_flow(y, u):
    """E[noise - image | y] of Gaussian data, y = (1 - u) image + u noise: regression of one on the other."""
    variance = (1 - u) ** 2 * S**2 + u**2
    covariance = u - (1 - u) * S**2
    return -M + covariance / variance * (y - (1 - u) * M)


def of_mixture(x, level):
    """The expected image of two bumps."""
    v = level.a**2 * WIDTH**2 + level.s**2
    log = SHARE.log() - (x - level.a * CENTRES) ** 2 / (2 * v)
    means = CENTRES + level.a * WIDTH**2 / v * (x - level.a * CENTRES)
    return Denoised((log.softmax(dim=1) * means).sum(dim=1, keepdim=True))


def test_the_network_sees_the_point_on_the_line_and_is_asked_for_its_speed():
    u = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    level = Straight().draw(u)
    image, noise = (torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    x = lv.add_noise(image, noise, level)
    line = (1 - u[:, None]) * image + u[:, None] * noise
    torch.testing.assert_close(tg.to_input("flow", x, level), line)
    torch.testing.assert_close(level.a**2 + level.s**2, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(level.time, 1000 * u)
    torch.testing.assert_close(tg.of_training("flow", image, noise, x, level), noise - image)


def test_the_error_of_the_flow_counts_evenly_and_other_weights_mean_the_same_loss():
    """With weight "uniform" the image's error counts 1 / u^2 times."""
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    level = Straight().draw(u)
    x, answer = X[:3], torch.tensor([[0.3], [-0.2], [0.7]], dtype=torch.float64)
    moved = tg.to_image("flow", answer + 0.01, x, level) - tg.to_image("flow", answer, x, level)
    torch.testing.assert_close(moved[:, 0], -0.01 * u)
    torch.testing.assert_close(tg.weight("min_snr", "flow", level), ((1 - u) ** 2 / u**2).clamp(max=5.0) * u**2)


@pytest.mark.parametrize("steps", [4, 25])
def test_ddim_is_eulers_method_on_the_line(steps):
    y, grid = X.clone(), np.linspace(1, 0, steps + 1)
    for u, after in pairwise(grid):
        y = y + (after - u) * expected_flow(y, u)
    levels = Straight().chain(steps, "trailing")
    torch.testing.assert_close(samplers.ddim(X, levels, denoiser(), lambda: None), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [4, 25])
def test_heun_is_heuns_method_on_the_line(steps):
    y, grid = X.clone(), np.linspace(1, 0, steps + 1)
    for u, after in pairwise(grid):
        slope = expected_flow(y, u)
        ahead = y + (after - u) * slope
        y = ahead if after == 0 else y + (after - u) * (slope + expected_flow(ahead, after)) / 2
    levels = Straight().chain(steps, "trailing")
    torch.testing.assert_close(samplers.heun(X, levels, denoiser(), straight=True), y, rtol=1e-12, atol=1e-12)


def test_the_orders_of_both_are_one_and_two():
    """The exact flow takes the start's quantile to the same quantile of the data."""
    exact = M + S * X

    def errors(sampler):
        return np.array([float((sampler(Straight().chain(n, "trailing")) - exact).abs().max()) for n in (20, 40, 80)])

    euler = errors(lambda levels: samplers.ddim(X, levels, denoiser(), lambda: None))
    heun = errors(lambda levels: samplers.heun(X, levels, denoiser(), straight=True))
    np.testing.assert_allclose(euler[:-1] / euler[1:], 2, rtol=0.1)
    np.testing.assert_allclose(heun[:-1] / heun[1:], 4, rtol=0.15)


def test_samples_of_a_mixture_have_its_moments():
    """The flow of one dimension keeps the order of points, so quantiles of noise become quantiles of the data."""
    n = 4001
    start = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]
    found = samplers.heun(start, Straight().chain(200, "trailing"), of_mixture, straight=True)[:, 0]
    mean = (SHARE * CENTRES).sum()
    for power in (2, 3, 4):
        off = CENTRES - mean
        about = {2: off**2 + WIDTH**2, 3: off**3 + 3 * off * WIDTH**2, 4: off**4 + 6 * off**2 * WIDTH**2 + 3 * WIDTH**4}
        assert float((found - mean).pow(power).mean()) == pytest.approx(float((SHARE * about[power]).sum()), rel=0.01)
    assert float(found.mean()) == pytest.approx(float(mean), abs=2e-3)


def test_what_a_straight_line_does_not_have():
    with pytest.raises(ConfigError, match='use "trailing"'):
        Straight().chain(10, "karras")
    with pytest.raises(ConfigError, match="set steps"):
        Straight().likelihood_chain(None)
    assert len(Straight().likelihood_chain(30)) == 30
