"""Noise of sensors: images x float32[B,3,H,W] in [0,1], severity 1 to 5. Constants: ``make_imagenet_c.py``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pipeline.nn.common_corruptions.draw import Draw

SHOT_TERMS = 160
"""Numbers of photons that are told apart; of at most 60 expected, more come once in 10^25."""


def gaussian_noise(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Added noise of the same strength everywhere."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * draw.normal(*x.shape[1:])


def shot_noise(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Photons that are counted: a Poisson number of so many at full brightness.

    By inversion: the brightness has 256 values, so all their distributions stand in one ascending row.
    """
    photons = (60, 25, 12, 5, 3)[severity - 1]
    level = (x * 255).round()
    known = _counts(photons).to(x.device)
    query = (level.double() + draw.uniform(*x.shape[1:]).double()).contiguous()
    count = torch.searchsorted(known, query, right=True) - level.long() * SHOT_TERMS
    return count.to(x.dtype) / photons


@lru_cache(maxsize=8)
def _counts(photons: int) -> Tensor:
    """v + P(count <= k) of brightness v / 255, float64[256 SHOT_TERMS], ascending."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] / 255 * photons
    count = torch.arange(SHOT_TERMS, dtype=torch.float64)
    log = torch.special.xlogy(count, mean) - mean - torch.lgamma(count + 1)
    below = log.exp().cumsum(dim=1)
    below[:, -1] = 1.0
    return (torch.arange(256, dtype=torch.float64)[:, None] + below.clamp(max=1.0)).flatten()


def impulse_noise(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Salt and pepper: a part of the values is all or nothing, with equal chances."""
    hit = draw.uniform(*x.shape[1:]) < (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    salt = draw.uniform(*x.shape[1:]) < 0.5
    return torch.where(hit, salt.to(x.dtype), x)


def speckle_noise(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Noise in proportion to the brightness."""
    return x + x * (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1] * draw.normal(*x.shape[1:])
