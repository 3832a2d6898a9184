"""How much of their space features fill, and when they have collapsed: all images at one point, or on one line.

RankMe: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by
Their Rank" (ICML 2023), eq. 1. The standard deviation of unit vectors: Chen and He, "Exploring Simple Siamese
Representation Learning" (CVPR 2021), section 4.1. Shape letters: N samples, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LEAST_STD, LEAST_RANK = 0.01, 1.5
"""Features below either have collapsed: cosines of different images are above 0.9999, or one direction holds all."""


class Spread(NamedTuple):
    """Of the features of a batch."""

    std: float
    """Mean over dimensions of the standard deviation of unit vectors, times the root of D: 1 where they fill the sphere
    evenly, 0 where all are one point."""
    rank: float
    """RankMe, from 1 (all on one line through zero) to the smaller of N and D."""

    @property
    def collapsed(self) -> bool:
        """Whether nothing is left to tell images apart by."""
        return self.std < LEAST_STD or self.rank < LEAST_RANK


def spread_of(x: Tensor) -> Spread:
    """Of features [N,D]; in float64 on the CPU, since it is a small matrix. NaN where one of them is not finite."""
    x = x.detach().cpu().double()
    if not x.isfinite().all():
        return Spread(math.nan, math.nan)
    return Spread(std_of_units(functional.normalize(x)), rankme(x))


def std_of_units(unit: Tensor) -> float:
    """See :class:`Spread`; of unit vectors [N,D]."""
    return float(unit.double().std(dim=0, unbiased=False).mean()) * math.sqrt(unit.shape[1])


def rankme(x: Tensor) -> float:
    """Exp of the entropy of the singular values of [N,D], divided by their sum; float64, the paper's epsilon 1e-7."""
    values = torch.linalg.svdvals(x.double())
    p = values / values.sum().clamp_min(1e-300) + 1e-7
    return float((-(p * p.log()).sum()).exp())
