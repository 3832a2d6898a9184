"""From a small map to a large one, a doubling at a time.

Strided transposed convolutions, as in Zhang et al. 2016 and Radford et al. 2016: their gradient adds nothing
atomically, so that a run on a GPU can be repeated bit for bit, which that of bilinear interpolation cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def doublings(widths: Sequence[int]) -> nn.Sequential:
    """[B,first width,H,W] to [B,last width,2^n H,2^n W], with n doublings between n + 1 widths, each with a ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)
