"""Samplers against closed forms on Gaussian data, where the best denoiser is known (the numbers are in float64)."""

import math

import numpy as np
import pytest
import torch

from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import samplers
from pipeline.nn.diffusion.samplers import Denoised
from tests.unit.nn.diffusion.gaussian import M, S, denoiser, marginal, outcome

LINEAR = lv.schedule("linear", 1000)


@pytest.mark.parametrize(
    ("variance", "s", "expected"), [("small", 0.5, 0.49611), ("large", 0.5, 0.50075), ("small", 1.0, 0.99552),
                                    ("large", 1.0, 0.99995)]
)  # fmt: skip
def test_ancestral_has_the_exact_spread(variance, s, expected):
    mean, deviation = outcome(samplers.ancestral, LINEAR, s=s, variance=variance)
    assert deviation == pytest.approx(expected, abs=6e-6)
    assert mean == pytest.approx(M, abs=2e-3)
    # the same by the recursion of mean and variance, written out
    a, sd = LINEAR.a.numpy(), LINEAR.s.numpy()
    k = a * s**2 / (a**2 * s**2 + sd**2)
    v = 1.0
    for i in range(999, -1, -1):
        before = 1.0 if i == 0 else a[i - 1] ** 2
        beta = 1 - a[i] ** 2 / before
        c1, c2 = beta * before**0.5 / sd[i] ** 2, (1 - before) * (a[i] / before**0.5) / sd[i] ** 2
        added = 0.0 if i == 0 else beta if variance == "large" else beta * (1 - before) / sd[i] ** 2
        v = (c1 * k[i] + c2) ** 2 * v + added
    assert deviation == pytest.approx(v**0.5, rel=1e-9)


def test_ancestral_with_the_exact_variance_as_a_learned_one():
    """The best reverse variance lies between the two; with it only the first step's share is lost."""
    a, sd = LINEAR.a, LINEAR.s
    left = S**2 * sd**2 / (a**2 * S**2 + sd**2)  # Var[image | x]
    exact = (LINEAR.variance + LINEAR.image_part**2 * left).log()
    part = (exact - LINEAR.log_small) / (LINEAR.log_beta - LINEAR.log_small)
    known = denoiser()

    def learned(x, level):
        i = int(level.time)
        return Denoised(known(x, level).image, part[i].expand_as(x))

    x = torch.zeros(1002, 1, dtype=torch.float64)
    x[1] = 1
    count = iter(range(2, 1002))
    out = samplers.ancestral(
        x, LINEAR, learned, lambda: torch.eye(1002, dtype=torch.float64)[:, [next(count)]], variance="learned"
    )[:, 0]
    factors = out[1:] - out[0]
    start = marginal(LINEAR)
    mean = float(out[0] + start[0] * factors[0])
    deviation = float(((factors[0] * start[1]) ** 2 + (factors[1:] ** 2).sum()).sqrt())
    v1 = float(a[0] ** 2 * S**2 + sd[0] ** 2)
    assert mean == pytest.approx(M, abs=1e-9)
    assert deviation == pytest.approx((S**2 - S**2 * float(sd[0]) ** 2 / v1) ** 0.5, abs=1e-9)
    assert deviation == pytest.approx(0.49990, abs=6e-6)


def test_no_noise_is_added_at_the_last_step():
    """Point data, where it would show: every sample is the point."""
    mean, deviation = outcome(samplers.ancestral, LINEAR, s=0.0, variance="small")
    assert (mean, deviation) == (pytest.approx(M, abs=1e-12), pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(10, 0.361606), (20, 0.430445), (50, 0.471908), (100, 0.485840), (250, 0.494263), (1000, 0.498488)],
)
def test_ddim_is_the_product_of_cosines(steps, expected):
    levels = lv.spaced(LINEAR, steps, "linspace")
    mean, deviation = outcome(samplers.ddim, levels, marginal(levels))
    assert mean == pytest.approx(M, abs=1e-12)
    assert deviation == pytest.approx(expected, abs=1e-6)
    theta = np.arctan2(np.append(0, levels.s.numpy()), S * np.append(1, levels.a.numpy()))
    assert deviation == pytest.approx(S * np.prod(np.cos(np.diff(theta))), rel=1e-10)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 13), ("leading", 50), ("karras", 20)])
def test_ddim_is_right_for_every_spacing(spacing, steps):
    levels = lv.spaced(LINEAR, steps, spacing)
    theta = np.arctan2(np.append(0, levels.s.numpy()), S * np.append(1, levels.a.numpy()))
    mean, deviation = outcome(samplers.ddim, levels, marginal(levels))
    assert mean == pytest.approx(M, abs=1e-12)
    assert deviation == pytest.approx(S * np.prod(np.cos(np.diff(theta))), rel=1e-10)


@pytest.mark.parametrize("steps", [10, 1000])
def test_ddim_with_eta_one_is_ancestral_sampling(steps):
    levels = lv.spaced(LINEAR, steps, "linspace")
    noise = torch.randn(steps + 1, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = iter(noise[1:]), iter(noise[1:])
    a = samplers.ddim(noise[0], levels, denoiser(), lambda: next(one), eta=1.0)
    b = samplers.ancestral(noise[0], levels, denoiser(), lambda: next(other), variance="small")
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# The variance-preserving process with beta from 0.1 to 20, on a grid that is even in lambda.
def even_grid(steps):
    def log_ratio(t):
        log_a = -0.25 * t**2 * 19.9 - 0.05 * t
        return log_a - 0.5 * math.log(-math.expm1(2 * log_a))

    lam = torch.linspace(log_ratio(1e-3), log_ratio(1.0), steps + 1, dtype=torch.float64)
    return lv.Levels(*lv.from_log_snr(2 * lam))


def error_of(sampler, steps):
    """Error at the cleanest level, whose exact value the ODE's closed form gives, from x = 1.1 at the noisiest.

    The samplers end at the clean image, not at the cleanest level; so look at the state that it is computed from.
    """
    levels = even_grid(steps)
    seen = []
    known = denoiser()

    def watch(x, level):
        seen.append((float(level.a), float(x)))
        return known(x, level)

    sampler(torch.full((1, 1), 1.1, dtype=torch.float64), levels, watch)
    a0, a1 = float(levels.a[0]), float(levels.a[-1])
    v0, v1 = marginal(levels, 0)[1], marginal(levels, -1)[1]
    exact = a0 * M + v0 / v1 * (1.1 - a1 * M)
    return next(x for a, x in reversed(seen) if a == a0) - exact


def test_orders_of_convergence():
    """O4. Errors at the end point for N = 10, 20, 40, 80, 160."""
    steps = (10, 20, 40, 80, 160)
    nothing = lambda: None  # noqa: E731
    ddim = [error_of(lambda x, levels, d: samplers.ddim(x, levels, d, nothing), n) for n in steps]
    solver = [error_of(samplers.dpm_solver, n) for n in steps]
    heun = [error_of(samplers.heun, n) for n in steps]
    np.testing.assert_allclose(ddim, [-0.1169, -0.0620, -0.0319, -0.0162, -0.0082], atol=6e-5)
    np.testing.assert_allclose(solver, [0.0180, 0.00715, 0.00193, 0.000489, 0.000123], rtol=5e-3)
    np.testing.assert_allclose(heun, [0.082, 0.0179, 0.00419, 0.00102, 0.00025], rtol=2e-2)


def test_dpm_solver_of_first_order_is_ddim():
    """Over two levels there is nothing to extrapolate, so both take the same first step."""
    levels = lv.spaced(LINEAR, 2, "linspace")
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    a = samplers.ddim(x, levels, denoiser(), lambda: None)
    torch.testing.assert_close(samplers.dpm_solver(x, levels, denoiser()), a)


@pytest.mark.parametrize("sampler", [samplers.dpm_solver, lambda x, v, d: samplers.ddim(x, v, d, lambda: None)])
def test_a_level_without_signal_is_no_reason_for_nan(sampler):
    levels = lv.spaced(lv.schedule("linear", 1000, zero_terminal_snr=True), 50, "trailing")
    mean, deviation = outcome(sampler, levels, draws=0)
    assert mean == pytest.approx(M, abs=1e-6) and 0.4 < deviation < 0.51


def test_evaluations_of_the_network():
    levels = lv.edm_grid(18)
    x = torch.randn(3, 1, dtype=torch.float64)
    for sampler, expected in (
        (samplers.heun, 35),
        (samplers.dpm_solver, 18),
        (lambda *a: samplers.ddim(*a, lambda: None), 18),
    ):
        seen = []
        sampler(x, levels, denoiser(seen=seen))
        assert len(seen) == expected


def test_heun_on_edms_grid_gives_the_data_back():
    mean, deviation = outcome(samplers.heun, lv.edm_grid(64), marginal(lv.edm_grid(64)), draws=0)
    assert mean == pytest.approx(M, abs=1e-6) and deviation == pytest.approx(S, rel=5e-3)


def test_mixture_data_gets_its_proportions():
    """O12: two narrow bumps, a denoiser that is not linear; the share of samples at each tends to the data's."""
    centres, share, width = torch.tensor([-0.8, 0.6]).double(), torch.tensor([0.3, 0.7]).double(), 0.05

    def denoise(x, level):
        v = level.a**2 * width**2 + level.s**2
        log = share.log() - (x - level.a * centres) ** 2 / (2 * v)
        means = centres + level.a * width**2 / v * (x - level.a * centres)
        return Denoised((log.softmax(dim=1) * means).sum(dim=1, keepdim=True))

    n = 4001
    quantiles = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]
    out = samplers.heun(quantiles, lv.spaced(LINEAR, 100, "karras"), denoise)[:, 0]
    assert float((out > 0).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert float(out[out > 0].mean()) == pytest.approx(0.6, abs=0.01)
    assert float(out[out < 0].std()) == pytest.approx(width, rel=0.1)
    # and the Frechet distance to the data falls as samples grow in number, towards what the sampler leaves
    mean = float((share * centres).sum())
    spread = (width**2 + float((share * (centres - mean) ** 2).sum())) ** 0.5
    shuffled = out[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def distance(count):
        parts = shuffled[: n // count * count].view(-1, count)
        return float(((parts.mean(1) - mean) ** 2 + (parts.std(1, correction=0) - spread) ** 2).mean())

    few, more, most = distance(10), distance(100), distance(1000)
    assert few > 5 * more > 20 * most and most < 2e-3 * spread**2
