"""Whether two models differ: intervals, tests and the smallest difference that could have been seen. No files here.

A difference is always second minus first, at a level of 95 %. How it is judged depends on what is known:

- outcomes that are right or wrong, each of its own source: McNemar's test (exact up to 25 discordant pairs, else
  chi-square with Edwards' continuity correction) and Tango's score interval (Statistics in Medicine 17, 1998);
- other outcomes, or several of one source: the t test of the mean difference, with the cluster-robust standard error
  (Miller, "Adding Error Bars to Evals", 2024, with the factor G / (G - 1)), and a BCa bootstrap over the sources (Efron
  and Tibshirani, 1993, chapter 14), from a seed of its own; of more than 100,000 sources the t interval;
- several seeds: both, samples and seeds, are drawn at chance (two crossed random effects, as in the analysis of
  variance), with Satterthwaite's degrees of freedom;
- standard errors alone: as if the two had been measured on samples of their own, which is wider than need be.

Shape letters: N samples, G sources, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
from scipy import special  # neither stats nor optimize: they take as long to import as many a command

from pipeline.record.found import Outcomes

LEVEL = 0.95
"""Of the intervals; a test finds a difference at one minus this."""
POWER = 0.8
"""How often the smallest difference that is worth the name would be found."""
EXACT = 25
"""Most discordant pairs for which McNemar's test sums the binomial."""
RESAMPLES = 10_000
"""Of a bootstrap, fewer (down to a thousand) where there are many sources."""
_DRAWS = 40_000_000
"""Most sources drawn in one bootstrap, before their number is the least that serves."""
_BOOTSTRAPPED = 100_000
"""Most sources; of more the mean is normal, as near as a thousand resamples could tell."""
_AT_ONCE = 4_000_000
"""Sources drawn at once."""
_Z = float(special.ndtri(0.5 + LEVEL / 2))


class Difference(NamedTuple):
    """Second minus first."""

    value: float
    low: float
    high: float
    p: float
    """Of no difference, before any correction."""
    smallest: float
    """The smallest difference that this many samples show in four of five cases."""
    method: str
    """In words."""


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of the discordant pairs: the first alone right, the second alone right."""
    n = lost + won
    if n <= EXACT:
        return min(1.0, 2 * float(special.bdtr(min(lost, won), n, 0.5)))
    return float(special.chdtrc(1, max(abs(lost - won) - 1, 0) ** 2 / n))


def tango(lost: int, won: int, n: int) -> tuple[float, float]:
    """Tango's score interval of the difference of two proportions of the same ``n`` samples."""

    def score(d: float) -> float:
        """How far what was found lies from a difference d, in standard errors."""
        b, c = (2 * n - won + lost) * d - won - lost, -lost * d * (1 - d)
        alone = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # the likeliest share of ``lost``, were it d
        return (won - lost - n * d) / math.sqrt(max(n * (2 * alone + d * (1 - d)), 1e-30))

    from scipy import optimize  # see above

    found = (won - lost) / n
    low = optimize.brentq(lambda d: score(d) - _Z, -1.0, found) if lost < n else -1.0
    high = optimize.brentq(lambda d: score(d) + _Z, found, 1.0) if won < n else 1.0
    return cast("float", low), cast("float", high)


def cluster_error(values: np.ndarray, sources: np.ndarray | None) -> tuple[float, int]:
    """Standard error of the mean of ``values``, samples of one source counting as one draw; and the number of sources.

    NaN where there is one source alone.
    """
    sums, sizes = _by_source(values, sources)
    count = len(sums)
    if count < 2:
        return math.nan, count
    off = sums - sizes * values.mean()
    return math.sqrt(count / (count - 1) * float(off @ off)) / len(values), count


def bootstrap(values: np.ndarray, sources: np.ndarray | None = None) -> tuple[float, float]:
    """BCa interval of the mean of ``values``, by drawing sources; the same for the same values."""
    sums, sizes = _by_source(values, sources)
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    rng = np.random.default_rng(0)
    resamples = min(max(_DRAWS // count, 1000), RESAMPLES)
    means = np.empty(resamples)
    for first in range(0, resamples, step := max(_AT_ONCE // count, 1)):
        drawn = rng.integers(count, size=(min(step, resamples - first), count), dtype=np.int32)
        weight = len(values) if sources is None else sizes[drawn].sum(1)
        means[first : first + step] = sums[drawn].sum(1) / weight
    below = (np.count_nonzero(means < mean) + np.count_nonzero(means == mean) / 2) / resamples
    if not 0 < below < 1 or np.ptp(sums) == 0 == np.ptp(sizes):
        return mean, mean
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    off = without.mean() - without
    bend = float((off**3).sum() / (6 * ((off**2).sum() ** 1.5)))
    shift = special.ndtri(below)
    to = shift + np.array([-_Z, _Z])
    low, high = np.quantile(means, special.ndtr(shift + to / (1 - bend * to)))
    return float(low), float(high)


def _by_source(values: np.ndarray, sources: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each source, float64[G] both."""
    if sources is None:
        return values.astype(np.float64), np.ones(len(values))
    _, group = np.unique(sources, return_inverse=True)
    return np.bincount(group, weights=values), np.bincount(group).astype(np.float64)


def paired(first: Outcomes, second: Outcomes) -> Difference:
    """Of two models on the same samples.

    Raises:
        ValueError: not the same number of samples, or none.
    """
    a, b, sources = _together(first, second)
    if a.dtype == b.dtype == bool and sources is None:
        lost, won = int((a & ~b).sum()), int((b & ~a).sum())
        # Fewer than six discordant pairs are never enough.
        smallest = max(_needed(math.sqrt(lost + won) / len(a), math.inf), 6 / len(a))
        how = "exact" if lost + won <= EXACT else "corrected"
        value = (won - lost) / len(a)
        return Difference(value, *tango(lost, won, len(a)), mcnemar(lost, won), smallest, f"McNemar, {how}")
    d = b.astype(np.float64) - a.astype(np.float64)
    error, count = cluster_error(d, sources)
    what = "samples" if sources is None else "sources"
    if math.isnan(error):
        return Difference(float(d.mean()), math.nan, math.nan, math.nan, math.nan, f"one of the {what} alone")
    plain = _student(float(d.mean()), error, count - 1, f"t over {count:,} {what}")
    if count > _BOOTSTRAPPED:
        return plain
    low, high = bootstrap(d, sources)
    return plain._replace(low=low, high=high, method=f"bootstrap of {count:,} {what}")


def p_value(first: Outcomes, second: Outcomes) -> float:
    """That of :func:`paired`, without an interval."""
    a, b, sources = _together(first, second)
    if a.dtype == b.dtype == bool and sources is None:
        return mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
    d = b.astype(np.float64) - a.astype(np.float64)
    error, count = cluster_error(d, sources)
    return _student(float(d.mean()), error, count - 1, "").p


def _together(first: Outcomes, second: Outcomes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    a, b = first.values, second.values
    if a.shape != b.shape or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} samples are no pairs")
    sources = first.sources if first.sources is not None else second.sources
    return a, b, sources


def unpaired(first: tuple[float, float], second: tuple[float, float]) -> Difference:
    """Of two models of which no more is known than value and standard error each."""
    error = math.hypot(first[1], second[1])
    return _student(second[0] - first[0], error, math.inf, "unpaired, from standard errors")


class Mean(NamedTuple):
    """A number over several seeds."""

    value: float
    error: float
    """Standard error, of samples and seeds together; NaN of one alone."""
    freedom: float
    """Degrees of freedom of the error."""


def over_seeds(values: np.ndarray, sources: np.ndarray | None = None) -> Mean:
    """Mean of what N samples add with each of S seeds, float[S,N], where both are drawn at chance.

    The standard error is that of two crossed random effects: mean squares of sources, plus of seeds, minus of what is
    left, where that is no less than nothing.
    """
    seeds, n = values.shape
    mean = float(values.mean())
    off = values.astype(np.float64) - mean
    table = np.stack([_by_source(row, sources)[0] for row in off])  # [S,G], without what all have in common
    count = table.shape[1]
    if min(seeds, count) < 2:
        return Mean(mean, math.nan, math.nan)
    rows, columns = table.mean(1), table.mean(0)
    left = table - rows[:, None] - columns
    freedom = np.array([count - 1, seeds - 1, (count - 1) * (seeds - 1)], dtype=np.float64)
    squares = np.array([seeds * (columns**2).sum(), count * (rows**2).sum(), (left**2).sum()]) / freedom
    sign = np.array([1.0, 1.0, -1.0]) if squares[1] > squares[2] else np.array([1.0, 0.0, 0.0])
    variance = float(sign @ squares)
    spread = float((sign**2 * squares**2 / freedom).sum())
    error = math.sqrt(variance * count * seeds) / (n * seeds)
    return Mean(mean, error, variance**2 / spread if spread > 0 else count - 1.0)


def seeds_alone(values: Sequence[float], errors: Sequence[float | None]) -> Mean:
    """Mean over seeds, of which no more is known than a value and perhaps a standard error each.

    The samples are the same with every seed, so that their error does not become smaller by more of them.
    """
    count = len(values)
    seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    samples = float(np.mean([(e or 0.0) ** 2 for e in errors]))
    freedom = (seeds + samples) ** 2 / (seeds**2 / (count - 1)) if seeds > 0 else math.inf
    return Mean(float(np.mean(values)), math.sqrt(seeds + samples), freedom)


def paired_over_seeds(first: Sequence[Outcomes], second: Sequence[Outcomes]) -> Difference:
    """Of two models on the same samples with the same seeds, in the same order.

    Raises:
        ValueError: not the same samples.
    """
    if len(first) == 1:
        return paired(first[0], second[0])
    pairs = [_together(a, b) for a, b in zip(first, second, strict=True)]
    d = np.stack([b.astype(np.float64) - a.astype(np.float64) for a, b, _ in pairs])
    return _student(*over_seeds(d, pairs[0][2]), f"{len(d)} seeds x {d.shape[1]:,} samples")


def seeds_unpaired(
    first: Sequence[tuple[float, float | None]], second: Sequence[tuple[float, float | None]]
) -> Difference:
    """As :func:`paired_over_seeds` of values and standard errors, one each with each seed."""
    values = [b - a for (a, _), (b, _) in zip(first, second, strict=True)]
    errors = [math.hypot(a or 0.0, b or 0.0) for (_, a), (_, b) in zip(first, second, strict=True)]
    return _student(*seeds_alone(values, errors), f"{len(values)} seeds, from standard errors")


def _student(value: float, error: float, freedom: float, method: str) -> Difference:
    """Interval, p and smallest difference of an estimate with an error of its own."""
    if math.isnan(error) or math.isnan(value):
        return Difference(value, math.nan, math.nan, math.nan, math.nan, method)
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, 0.0, method)
    wide = error * _quantile(0.5 + LEVEL / 2, freedom)
    p = 2 * _below(-abs(value) / error, freedom)
    return Difference(value, value - wide, value + wide, p, _needed(error, freedom), method)


def _quantile(p: float, freedom: float) -> float:
    """Of Student's t; where the freedom is infinite, of the normal distribution."""
    return float(special.ndtri(p) if math.isinf(freedom) else special.stdtrit(freedom, p))


def _below(t: float, freedom: float) -> float:
    """The chance of less than ``t``, likewise."""
    return float(special.ndtr(t) if math.isinf(freedom) else special.stdtr(freedom, t))


def _needed(error: float, freedom: float) -> float:
    """The difference that is found in four of five cases, of an estimate with such an error."""
    return error * (_quantile(0.5 + LEVEL / 2, freedom) + _quantile(POWER, freedom))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: with these, the chance of even one false find among all is at most the level's.

    NaN stays NaN and does not count as a comparison.
    """
    order = sorted((i for i, one in enumerate(p) if not math.isnan(one)), key=lambda i: p[i])
    corrected, least = list(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min((len(order) - rank) * p[i], 1.0))
        corrected[i] = least
    return corrected
