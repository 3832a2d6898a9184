"""Means and covariances of domains over the global batch, and how far those of two domains lie apart.

Deep CORAL: Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation" (ECCV 2016 workshops),
equations 1 to 3: |C_s - C_t|_F^2 / (4 d^2), covariances with n - 1. Between the sources of domain generalisation
DomainBed (Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021) takes the mean squared
differences of means and covariances, without the quarter.

Shape letters: n rows of this rank, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.dist.collectives import mean_over_ranks, rank_and_world, wide

LEAST = 1e-6
"""Of what is left of the weights beside each sample's own; below it there is one sample, and no covariance."""


class Moments(NamedTuple):
    """Of a domain, over all ranks."""

    mean: Tensor
    """float[D]."""
    covariance: Tensor
    """float[D,D], unbiased."""
    known: Tensor
    """float[], 1; 0 where fewer than two samples have a weight."""


def moments(rows: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and covariance over the global batch, in at least fp32, with gradient; no rows travel.

    Args:
        rows: float[n,D], of this rank.
        weights: float[n], not negative; left out: all alike. The covariance is divided by 1 - sum of w^2, with weights
            that sum up to 1, which is (N - 1) / N where all are alike.

    Raises:
        ConfigError: the global batch has one sample.
    """
    x, world = wide(rows), rank_and_world()[1]
    if len(x) * world < 2:
        raise ConfigError("a covariance needs two samples, and the global batch has one; raise run.global_batch")
    own = x.new_ones(len(x)) if weights is None else weights.detach().to(x)
    with torch.autocast(x.device.type, enabled=False):
        total = mean_over_ranks(own.sum()) * world
        w = own / total.clamp_min(torch.finfo(x.dtype).tiny)
        mean = mean_over_ranks(w @ x) * world
        centred = x - mean
        apart = 1 - mean_over_ranks(w.square().sum()) * world
        known = (total > 0) & (apart > LEAST)
        covariance = mean_over_ranks(centred.T @ (w[:, None] * centred)) * world / apart.clamp_min(LEAST)
    return Moments(mean, covariance, known.to(x.dtype))


def coral(source: Moments, target: Moments) -> Tensor:
    """|C_s - C_t|_F^2 / (4 D^2); 0 where one is not known."""
    width = len(source.mean)
    known = source.known * target.known
    return known * (source.covariance - target.covariance).square().sum() / (4 * width**2)


def moment_distance(one: Moments, other: Moments) -> Tensor:
    """DomainBed's: mean squared difference of the means, and that of the covariances."""
    known = one.known * other.known
    return known * ((one.mean - other.mean).square().mean() + (one.covariance - other.covariance).square().mean())
