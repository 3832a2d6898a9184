import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.nn.diffusion import levels as lv


def alpha_bar(name, steps):
    """Plain transcription in numpy."""
    if name == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, steps) * 1.0)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return np.cumprod([1 - min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_bar_is_that_of_the_papers(name):
    levels = lv.schedule(name, 1000)
    np.testing.assert_allclose(levels.a.numpy() ** 2, alpha_bar(name, 1000), rtol=1e-10)


def test_published_ends():
    linear, cosine = lv.schedule("linear", 1000), lv.schedule("cosine", 1000)
    assert float(linear.a[0] ** 2) == pytest.approx(0.9999, rel=1e-12)
    assert float(linear.a[-1] ** 2) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float((linear.a / linear.s).log()[-1]) == pytest.approx(-5.059, abs=1e-3)
    assert float(cosine.a[0] ** 2) == pytest.approx(0.999959, abs=5e-7)
    assert float(cosine.a[-1] ** 2) == pytest.approx(2.43e-9, rel=2e-3)
    assert float((cosine.a / cosine.s).log()[-1]) == pytest.approx(-9.918, abs=1e-3)


def test_sigmoid_falls_from_one_to_zero_and_is_symmetric():
    steps = 1000
    kept = lv.schedule("sigmoid", steps).a.numpy() ** 2
    sigma = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    u = np.arange(1, steps + 1) / steps
    expected = (sigma(3) - sigma(6 * u - 3)) / (sigma(3) - sigma(-3))
    np.testing.assert_allclose(kept[:-1], expected[:-1], rtol=1e-9)
    assert kept[499] == pytest.approx(0.5, abs=1e-12) and 0 < kept[-1] < 1e-5


@pytest.mark.parametrize("steps", [200, 500, 4000])
def test_a_linear_schedule_of_any_length_ends_at_about_the_same_noise(steps):
    levels = lv.schedule("linear", steps)
    assert float((levels.a / levels.s).log()[-1]) == pytest.approx(-5.06, abs=0.2)
    assert float(levels.time[-1]) == pytest.approx(1000 - 1000 / steps)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_is_exact_and_keeps_the_first_level(name):
    plain, zero = lv.schedule(name, 100), lv.schedule(name, 100, zero_terminal_snr=True)
    assert float(zero.a[-1]) == 0.0 and float(zero.s[-1]) == 1.0
    assert float(zero.a[0]) == pytest.approx(float(plain.a[0]), abs=1e-15)
    a = plain.a.numpy()
    np.testing.assert_allclose(zero.a.numpy(), (a - a[-1]) * a[0] / (a[0] - a[-1]), rtol=1e-12, atol=1e-16)
    for table in (zero.beta, zero.image_part, zero.noised_part, zero.variance, zero.log_small, zero.log_large):
        assert table.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_posterior_is_that_of_bayes(name):
    levels = lv.schedule(name, 200)
    kept = levels.a.numpy() ** 2
    before = np.append(1.0, kept[:-1])
    alpha = kept / before
    # precision of N(x_t; sqrt(alpha) x_{t-1}, beta) N(x_{t-1}; sqrt(before) x_0, 1 - before) in x_{t-1}
    precision = alpha[1:] / (1 - alpha[1:]) + 1 / (1 - before[1:])
    np.testing.assert_allclose(levels.variance[1:].numpy(), 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(
        levels.noised_part[1:].numpy(), np.sqrt(alpha[1:]) / (1 - alpha[1:]) / precision, rtol=1e-9
    )
    np.testing.assert_allclose(
        levels.image_part[1:].numpy(), np.sqrt(before[1:]) / (1 - before[1:]) / precision, rtol=1e-9
    )
    assert (float(levels.image_part[0]), float(levels.noised_part[0]), float(levels.variance[0])) == (1.0, 0.0, 0.0)


def test_the_first_levels_variances_are_those_that_have_a_logarithm():
    levels = lv.schedule("linear", 1000)
    assert float(levels.log_small[0]) == float(levels.log_small[1]) == pytest.approx(-9.82, abs=0.01)
    assert float(levels.log_large[0]) == float(levels.log_small[1])
    assert float(levels.log_beta[0]) == pytest.approx(math.log(1e-4))
    assert torch.equal(levels.log_large[1:], levels.log_beta[1:])


def test_spacings_visit_what_diffusers_names_so():
    levels = lv.schedule("linear", 1000)

    def times(spacing, steps):
        return [round(t) for t in lv.spaced(levels, steps, spacing).time.tolist()]

    assert times("leading", 50) == list(range(0, 1000, 20))
    assert times("trailing", 50) == list(range(19, 1000, 20))
    assert times("linspace", 5) == [0, 250, 500, 749, 999]
    assert times("trailing", 13)[-1] == 999 and len(set(times("trailing", 13))) == 13
    assert times("leading", 1000) == times("trailing", 1000) == times("linspace", 1000) == list(range(1000))


def test_karras_grid_has_the_ends_and_the_times_of_the_schedule():
    levels = lv.schedule("linear", 1000)
    grid = lv.spaced(levels, 18, "karras")
    assert float(grid.time[0]) == 0.0 and float(grid.time[-1]) == pytest.approx(999.0)
    assert (grid.time.diff() > 0).all()
    # between two levels the time is between theirs
    sigma = (levels.s / levels.a).numpy()
    for s, time in zip((grid.s / grid.a).tolist(), grid.time.tolist(), strict=True):
        right = int(np.searchsorted(sigma, s * (1 + 1e-12)))
        assert right - 1 - 1e-6 <= time <= right + 1e-6


def test_edm_grid_is_the_papers():
    grid = lv.edm_grid(18)
    n = np.arange(18)
    expected = (80 ** (1 / 7) + n / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose((grid.s / grid.a).numpy()[::-1], expected, rtol=1e-9)
    np.testing.assert_allclose(grid.time.numpy()[::-1], np.log(expected) / 4, rtol=1e-9)
    np.testing.assert_allclose((grid.a**2 + grid.s**2).numpy(), 1, rtol=1e-14)


@given(st.floats(-14, 14))
def test_levels_by_sigma_and_by_log_snr_are_the_same(log_snr):
    one = lv.from_log_snr(torch.tensor(log_snr, dtype=torch.float64))
    other = lv.from_sigma(torch.tensor(math.exp(-log_snr / 2), dtype=torch.float64))
    assert float(one.a) == pytest.approx(float(other.a), rel=1e-12)
    assert float(one.s) == pytest.approx(float(other.s), rel=1e-12)
    assert float(one.snr.log()) == pytest.approx(log_snr, abs=1e-9)


def test_noising_is_never_done_below_float32():
    """In bf16 ten levels of the linear schedule would get no noise at all (diffusers' scripts)."""
    levels = lv.schedule("linear", 1000)
    index = torch.arange(1000)
    image, noise = torch.ones(1000, 1), torch.full((1000, 1), 0.5)
    x = lv.add_noise(image.bfloat16(), noise, levels.at(index))
    expected = levels.a + levels.s * 0.5
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0].double(), expected, rtol=2e-7, atol=0)


def test_steps_that_the_process_has_not_are_refused():
    levels = lv.schedule("linear", 100)
    for steps in (1, 101):
        with pytest.raises(ConfigError, match="take 2 to 100"):
            lv.spaced(levels, steps, "leading")
    with pytest.raises(ConfigError, match="trailing"):
        lv.spaced(lv.schedule("linear", 100, zero_terminal_snr=True), 10, "karras")


def test_marginal_and_the_best_error():
    """O1: of data N(m, s^2), x is N(a m, v) with v = a^2 s^2 + sd^2, and E|image - E[image | x]|^2 = s^2 sd^2 / v."""
    m, s = 0.3, 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    image, noise = (torch.from_numpy(g).reshape(-1, 1) for g in np.meshgrid(m + s * nodes, nodes, indexing="ij"))
    p = torch.from_numpy(np.outer(weights, weights) / weights.sum() ** 2).flatten()
    levels = lv.schedule("cosine", 1000)
    for i in (0, 100, 500, 900, 999):
        level = levels.at(torch.tensor(i))
        x = lv.add_noise(image, noise, level)[:, 0]
        a, sd = float(level.a), float(level.s)
        v = a**2 * s**2 + sd**2
        mean = float(p @ x)
        assert mean == pytest.approx(a * m, abs=1e-12)
        assert float(p @ (x - mean) ** 2) == pytest.approx(v, rel=1e-10)
        best = m + a * s**2 / v * (x - a * m)
        assert float(p @ (image[:, 0] - best) ** 2) == pytest.approx(s**2 * sd**2 / v, rel=1e-10)
