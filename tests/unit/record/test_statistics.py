"""Statistics against other programs' formulas, and against chance: intervals hold the truth as often as they say."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from pipeline.record import statistics
from pipeline.record.statistics import (
    Outcomes,
    bootstrap,
    cluster_error,
    holm,
    mcnemar,
    over_seeds,
    p_value,
    paired,
    paired_over_seeds,
    seeds_alone,
    seeds_unpaired,
    tango,
    unpaired,
)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (0, 6), (3, 9), (12, 13), (5, 20)])
def test_mcnemar_of_few_pairs_is_the_sum_of_the_binomial(lost, won):
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


@pytest.mark.parametrize(("lost", "won"), [(6, 20), (40, 60), (121, 59), (50, 50)])
def test_mcnemar_of_more_is_chi_square_with_a_correction(lost, won):
    # statsmodels.stats.contingency_tables.mcnemar(exact=False, correction=True), written out
    statistic = (abs(lost - won) - 1) ** 2 / (lost + won) if lost != won else 0.0
    assert mcnemar(lost, won) == pytest.approx(math.erfc(math.sqrt(statistic / 2)), rel=1e-9)


def test_tango_where_it_has_a_closed_form():
    z2 = 1.959963984540054**2
    assert tango(0, 0, 10) == pytest.approx((-z2 / (10 + z2), z2 / (10 + z2)))
    assert tango(50, 0, 50) == pytest.approx((-1.0, -(50 - z2) / (50 + z2)))
    assert tango(0, 50, 50) == pytest.approx(((50 - z2) / (50 + z2), 1.0))


@pytest.mark.parametrize(("lost", "won", "n"), [(3, 11, 40), (10, 2, 25), (70, 100, 5000), (0, 7, 30)])
def test_tango_is_the_set_of_differences_that_the_score_test_keeps(lost, won, n):
    """The likelihood maximised by a search over a grid, in place of the closed form."""

    def statistic(d: float) -> float:
        share = np.linspace(max(0.0, -d), (1 - d) / 2, 200_001)[1:-1]  # of pairs that the first alone has right
        with np.errstate(divide="ignore", invalid="ignore"):
            likely = lost * np.log(share) + won * np.log(share + d) + (n - lost - won) * np.log(1 - 2 * share - d)
        likely[np.isnan(likely)] = -np.inf
        best = share[likely.argmax()]
        return (won - lost - n * d) / math.sqrt(n * (2 * best + d - d * d))

    low, high = tango(lost, won, n)
    assert statistic(low) == pytest.approx(1.959964, abs=2e-3)
    assert statistic(high) == pytest.approx(-1.959964, abs=2e-3)


def test_bootstrap_is_scipys():
    rng = np.random.default_rng(1)
    values = rng.gamma(0.5, size=60)
    low, high = bootstrap(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", random_state=0).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * width and abs(high - theirs.high) < 0.03 * width
    assert values.mean() - low < 0.85 * (high - values.mean())  # skewed, as the values are: no percentile interval
    assert bootstrap(values) == (low, high)


def test_bootstrap_of_sources_is_scipys_of_a_ratio():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 9, 50)
    sums = rng.gamma(0.7, size=50) * sizes
    sources = np.repeat(np.arange(50), sizes)
    values = np.repeat(sums / sizes, sizes)

    def ratio(x, y, axis=-1):
        return x.sum(axis) / y.sum(axis)

    shuffled = rng.permutation(len(values))
    low, high = bootstrap(values[shuffled], 7 * sources[shuffled] - 3)
    found = stats.bootstrap((sums, sizes), ratio, paired=True, n_resamples=10_000, method="BCa", random_state=0)
    theirs = found.confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * width and abs(high - theirs.high) < 0.03 * width


def test_cluster_error_is_the_sandwich():
    """statsmodels' OLS on a constant, cov_type="cluster", written as matrices."""
    rng = np.random.default_rng(3)
    sources = rng.integers(0, 12, 100)
    values = rng.normal(size=100) + 0.7 * sources
    same = (sources[:, None] == sources[None, :]).astype(float)
    off = values - values.mean()
    count = len(set(sources.tolist()))
    expected = math.sqrt(count / (count - 1) * off @ same @ off) / 100
    assert cluster_error(values, sources) == (pytest.approx(expected, rel=1e-12), count)
    assert cluster_error(values, None) == (pytest.approx(values.std(ddof=1) / 10, rel=1e-12), 100)


def test_over_seeds_is_the_analysis_of_variance():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(4, 30)) + rng.normal(size=(4, 1)) + rng.normal(size=30)
    row, column, all_of = values.mean(1), values.mean(0), values.mean()
    samples = 4 * sum((column - all_of) ** 2) / 29
    seeds = 30 * sum((row - all_of) ** 2) / 3
    rest = sum((values[s, i] - row[s] - column[i] + all_of) ** 2 for s in range(4) for i in range(30)) / 87
    found = over_seeds(values)
    assert found.value == pytest.approx(all_of)
    assert found.error == pytest.approx(math.sqrt((samples + seeds - rest) / 120), rel=1e-10)
    freedom = (samples + seeds - rest) ** 2 / (samples**2 / 29 + seeds**2 / 3 + rest**2 / 87)
    assert found.freedom == pytest.approx(freedom, rel=1e-10)
    alike = np.repeat(values[:1], 3, 0)  # seeds that change nothing: the error of the samples alone
    assert over_seeds(alike).error == pytest.approx(values[0].std(ddof=1) / math.sqrt(30))


def test_seeds_without_samples():
    found = seeds_alone([0.5, 0.6, 0.7], [0.03, 0.04, None])
    assert found.value == pytest.approx(0.6)
    assert found.error == pytest.approx(math.sqrt(0.01 / 3 + 0.0025 / 3))
    difference = seeds_unpaired([(0.5, 0.03), (0.6, 0.0)], [(0.6, 0.04), (0.8, None)])
    assert difference.value == pytest.approx(0.15) and "2 seeds" in difference.method
    error = math.sqrt(0.005 / 2 + 0.0025 / 2)
    assert difference.high - difference.low > 2 * 1.96 * error  # two seeds know little of their own spread


def cover(truth: float, intervals) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def near(share: float, trials: int) -> bool:
    """95 %, within three standard errors of the simulation and what these methods are off at such sizes."""
    return abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials) + 0.012


def test_mcnemars_interval_covers():
    rng = np.random.default_rng(5)
    shares = np.array([0.55, 0.25, 0.14, 0.06])  # both, neither, second alone, first alone
    found = []
    for _ in range(1500):
        kind = rng.choice(4, 80, p=shares)
        first, second = (kind == 0) | (kind == 3), (kind == 0) | (kind == 2)
        found.append(paired(Outcomes(first), Outcomes(second)))
    assert near(cover(0.08, [(d.low, d.high) for d in found]), 1500)
    assert all(d.low <= d.value <= d.high for d in found)


def test_mcnemar_errs_no_more_often_than_it_says():
    rng = np.random.default_rng(6)
    wrong = [mcnemar(int(k), n - int(k)) < 0.05 for n in (20, 60) for k in rng.binomial(n, 0.5, 2000)]
    assert 0.01 < np.mean(wrong) < 0.055


def test_the_paired_bootstrap_covers(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    rng = np.random.default_rng(7)
    common = rng.normal(size=(500, 40)) * 5  # what makes the unpaired interval useless
    found, plain = [], []
    for base in common:
        first, second = base + rng.normal(size=40), base + rng.gamma(2.0, size=40)
        found.append(paired(Outcomes(first.astype(np.float32)), Outcomes(second.astype(np.float32))))
        errors = [float(x.std(ddof=1)) / math.sqrt(40) for x in (first, second)]
        plain.append(unpaired((float(first.mean()), errors[0]), (float(second.mean()), errors[1])))
    assert near(cover(2.0, [(d.low, d.high) for d in found]), 500)
    assert cover(2.0, [(d.low, d.high) for d in plain]) == 1.0
    assert "bootstrap" in found[0].method and "unpaired" in plain[0].method


def clustered(rng, groups=60, size=5, within=0.49):
    """Differences of samples of which five share a source, of mean 0.1."""
    effect = np.repeat(rng.normal(size=groups), size) * math.sqrt(within)
    return 0.1 + effect + rng.normal(size=groups * size) * math.sqrt(1 - within), np.repeat(np.arange(groups), size)


def test_intervals_of_clustered_samples_cover_and_naive_ones_do_not(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    rng = np.random.default_rng(8)
    found, blind, tests = [], [], []
    for _ in range(600):
        d, sources = clustered(rng)
        nothing = np.zeros(len(d))
        found.append(paired(Outcomes(nothing, sources), Outcomes(d, sources)))
        blind.append(statistics._student(float(d.mean()), *cluster_error(d, None), ""))
        tests.append(p_value(Outcomes(nothing, sources), Outcomes(d - 0.1, sources)))
    assert near(cover(0.1, [(d.low, d.high) for d in found]), 600)
    assert 0.70 < cover(0.1, [(d.low, d.high) for d in blind]) < 0.79
    assert 0.03 < np.mean(np.array(tests) < 0.05) < 0.08


def test_right_and_wrong_of_one_source_are_no_pairs_of_mcnemar():
    rng = np.random.default_rng(9)
    sources = np.repeat(np.arange(40), 5)
    first = np.repeat(rng.random(40) < 0.5, 5)
    second = np.repeat(rng.random(40) < 0.5, 5)
    found = paired(Outcomes(first, sources), Outcomes(second, sources))
    assert found.method == "bootstrap of 40 sources"
    single = paired(Outcomes(first[::5]), Outcomes(second[::5]))  # five copies of a sample say what one says
    assert found.high - found.low == pytest.approx(single.high - single.low, rel=0.15)
    assert found.smallest == pytest.approx(single.smallest, rel=0.15)


def test_intervals_over_seeds_cover():
    rng = np.random.default_rng(10)
    found, blind = [], []
    for _ in range(1000):
        d = 0.3 + rng.normal(size=(5, 1)) * 0.3 + rng.normal(size=60) + rng.normal(size=(5, 60))
        zero = [Outcomes(np.zeros(60))] * 5
        found.append(paired_over_seeds(zero, [Outcomes(one) for one in d]))
        samples = d.mean(0)
        blind.append(statistics._student(float(d.mean()), *cluster_error(samples, None), ""))
    assert near(cover(0.3, [(d.low, d.high) for d in found]), 1000)
    assert cover(0.3, [(d.low, d.high) for d in blind]) < 0.9


def test_the_smallest_difference_is_found_in_four_of_five_cases():
    rng = np.random.default_rng(11)
    smallest = np.mean(
        [statistics._student(0.0, *cluster_error(rng.normal(size=50), None), "").smallest for _ in range(200)]
    )
    found = [p_value(Outcomes(np.zeros(50)), Outcomes(rng.normal(size=50) + smallest)) < 0.05 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    # 5 % of a thousand pairs are discordant: a normal's 2.8 standard errors
    first = np.zeros(1000, dtype=bool)
    second = first.copy()
    first[:25], second[25:50] = True, True
    assert paired(Outcomes(first), Outcomes(second)).smallest == pytest.approx(2.8016 * math.sqrt(50) / 1000, rel=1e-3)
    assert paired(Outcomes(first), Outcomes(first)).smallest == 6 / 1000


def test_holm():
    # statsmodels.stats.multitest.multipletests(method="holm") of these
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == 0.02 and math.isnan(found[1]) and found[2] == 0.02


def test_holm_keeps_the_chance_of_one_false_find():
    p = np.random.default_rng(12).random((2000, 20))
    assert np.mean([min(holm(row)) < 0.05 for row in p.tolist()]) == pytest.approx(0.05, abs=0.015)


def test_what_does_not_differ():
    same = Outcomes(np.array([0.5, 0.25, 0.75], dtype=np.float32))
    found = paired(same, same)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    right = Outcomes(np.array([True, False, True]))
    assert paired(right, right).p == 1.0 and paired(right, right).low < 0 < paired(right, right).high
    one = paired(Outcomes(np.array([0.5])), Outcomes(np.array([0.75])))
    assert one.value == 0.25 and math.isnan(one.p) and math.isnan(one.low)
    with pytest.raises(ValueError, match="3 and 2 samples"):
        paired(same, Outcomes(np.array([0.5, 0.5])))


def test_very_many_samples_are_not_drawn_again(monkeypatch):
    values = np.random.default_rng(13).normal(size=2000)
    drawn = paired(Outcomes(np.zeros(2000)), Outcomes(values))
    monkeypatch.setattr(statistics, "_BOOTSTRAPPED", 1000)
    plain = paired(Outcomes(np.zeros(2000)), Outcomes(values))
    assert plain.method == "t over 2,000 samples"
    assert (plain.low, plain.high) == pytest.approx((drawn.low, drawn.high), abs=0.003)


def test_what_takes_long_to_import_is_not():
    """`sluice compare`, every report and every suite wait for this module."""
    code = "import sys, pipeline.record.statistics; print({'scipy.stats', 'scipy.optimize'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
