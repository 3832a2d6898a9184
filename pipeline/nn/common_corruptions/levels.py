"""From numbers to the 256 levels of a stored image."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 1e-3
"""Of a level: what is a level but for rounding stays that level, so that no batch and no device decides."""


def to_levels(x: Tensor) -> Tensor:
    """[0,1] to uint8, cut off as ImageNet-C's authors do and not rounded; beyond [0,1] clipped."""
    return (x.clamp(0, 1) * 255 + SLACK).to(torch.uint8)


def stored(x: Tensor) -> Tensor:
    """The same in [0,1] as it is after it was stored."""
    return to_levels(x).to(x.dtype) / 255
