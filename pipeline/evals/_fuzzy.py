"""Fuzzy c-means (Bezdek 1981). Shape letters: N samples, D width, K clusters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.cluster import kmeans_plusplus

from pipeline.evals._clusters import Given

TINY = 1e-12
"""Least squared distance: a sample in a centre belongs to it alone."""


class Fuzzy(NamedTuple):
    """What was found."""

    membership: np.ndarray
    """float64[N,K], rows that add up to one."""
    objective: float
    partition: float
    """(mean of the sum of u^2 - 1/K) / (1 - 1/K)."""


def fuzzy_c_means(given: Given, fuzzifier: float, seed: int, iterations: int, tolerance: float) -> Fuzzy:
    """Fuzzy c-means from the centres of one k-means++ start, in float64; powers are taken as logarithms."""
    x, count = given.x.astype(np.float64), given.clusters
    centres, _ = kmeans_plusplus(x, count, random_state=seed)
    membership = np.zeros((len(x), count))
    squared = np.square(x).sum(axis=1)
    objective = 0.0
    for _ in range(iterations):
        distance = squared[:, None] - 2 * x @ centres.T + np.square(centres).sum(axis=1)
        log = np.log(np.maximum(distance, TINY)) / (1 - fuzzifier)
        log -= log.max(axis=1, keepdims=True)
        new = np.exp(log)
        new /= new.sum(axis=1, keepdims=True)
        weight = new**fuzzifier
        objective = float((weight * np.maximum(distance, TINY)).sum())
        moved = float(np.abs(new - membership).max())
        membership = new
        if moved <= tolerance:
            break
        centres = weight.T @ x / np.maximum(weight.sum(axis=0)[:, None], TINY)
    partition = float((np.square(membership).sum(axis=1).mean() - 1 / count) / (1 - 1 / count))
    return Fuzzy(membership, objective, partition)
