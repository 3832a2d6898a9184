"""Averages of weights along training: how fast they forget, and averages of any width after the fact.

Warm-up as in TensorFlow's ExponentialMovingAverage, so that the initial weights are forgotten in time. Power-function
averages and their reconstruction: Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def decay(largest: float, updates: int) -> float:
    """What is kept of the average at update number ``updates``, counted from 1: at most (1 + n) / (10 + n)."""
    return min(largest, (1 + updates) / (10 + updates))


def power_decay(gamma: float, updates: int) -> float:
    """What is kept so that the average weighs the state after update k by about k ** gamma; 0 at the first update."""
    return (1 - 1 / updates) ** (gamma + 1)


def gamma_of(width: float) -> float:
    """The exponent of the average with a relative width: the standard deviation of its profile over its length.

    Args:
        width: above 0, below 0.28.
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5 > width
        low, high = (middle, high) if wide else (low, middle)
    return low


def posthoc(kept: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> list[float]:
    """Factors, adding up to 1, of stored power-function averages that give the one nearest to ``wanted``.

    Least squares over the profiles (k / t) ** gamma * (gamma + 1) / t for k from 0 to t.

    Args:
        kept: step and gamma of each stored average, all different.
        wanted: step and gamma.
    """
    matrix = np.array([[_product(a, b) for b in kept] for a in kept])
    right = np.array([_product(a, wanted) for a in kept])
    # the constraint by a Lagrange multiplier
    n = len(kept)
    system = np.block([[matrix, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    return np.linalg.solve(system, np.append(right, 1.0))[:n].tolist()


def _product(one: tuple[int, float], other: tuple[int, float]) -> float:
    """Integral of the product of two profiles, times the longer length so that numbers stay near 1."""
    (t, gamma), (t2, gamma2) = (one, other) if one[0] <= other[0] else (other, one)
    return (gamma + 1) * (gamma2 + 1) / (gamma + gamma2 + 1) * (t / t2) ** gamma2 / t2
