import numpy as np
import pytest

from pipeline.nn import ema


@pytest.mark.parametrize(("width", "gamma", "mean"), [(0.10, 6.94, 0.88814), (0.05, 16.97, 0.94729)])
def test_the_power_average_of_a_straight_line(width, gamma, mean):
    """O9: of theta(t) = t it is (gamma + 1) / (gamma + 2) of the last value."""
    found = ema.gamma_of(width)
    assert found == pytest.approx(gamma, abs=5e-3)
    average, n = 0.0, 20000
    for t in range(1, n + 1):
        keep = ema.power_decay(found, t)
        average = keep * average + (1 - keep) * t
    assert average / n == pytest.approx((found + 1) / (found + 2), rel=1e-3)
    assert average / n == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_width_is_the_standard_deviation_of_the_profile(width):
    gamma = ema.gamma_of(width)
    u = (np.arange(200000) + 0.5) / 200000
    p = u**gamma / (u**gamma).sum()
    mean = (p * u).sum()
    assert np.sqrt((p * (u - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def test_warm_up_forgets_the_first_weights():
    left = 1.0
    for n in range(1, 10001):
        left *= ema.decay(0.9999, n)
    assert left < 1e-25  # (1 + n) / (10 + n) multiplies to about n ** -9
    assert ema.decay(0.9999, 1) == 2 / 11 and ema.decay(0.9999, 10**6) == 0.9999


def test_a_stored_average_is_found_again_and_others_come_near():
    """On a random walk, reconstructed from eight snapshots of two widths, against the average computed directly."""
    n, gammas = 4000, [ema.gamma_of(w) for w in (0.05, 0.10)]
    walk = np.cumsum(np.random.default_rng(0).normal(size=(n, 50)), axis=0)

    def run(gamma, end):
        average = np.zeros(50)
        for t in range(1, end + 1):
            keep = ema.power_decay(gamma, t)
            average = keep * average + (1 - keep) * walk[t - 1]
        return average

    kept = [(t, g) for t in range(n // 8, n + 1, n // 8) for g in gammas]
    stored = [run(g, t) for t, g in kept]
    same = ema.posthoc(kept, (n, gammas[0]))
    assert same[-2] == pytest.approx(1, abs=1e-6) and sum(abs(f) for f in same) == pytest.approx(1, abs=1e-5)
    spread = walk.std()
    for width in (0.04, 0.07, 0.12, 0.2):
        wanted = ema.gamma_of(width)
        factors = ema.posthoc(kept, (n, wanted))
        assert sum(factors) == pytest.approx(1, abs=1e-9)
        near = sum(f * s for f, s in zip(factors, stored, strict=True))
        exact = run(wanted, n)
        others = min(np.abs(run(g, n) - exact).mean() for g in gammas)
        assert np.abs(near - exact).mean() < 0.02 * spread and np.abs(near - exact).mean() < others / 2
