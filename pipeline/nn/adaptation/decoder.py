"""From features back to images, for objectives that reconstruct.

Shape letters: B samples, D width of the features, C channels, H height, W width.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

SMALLEST = 4
"""Least height and width of the first map."""


class FeatureDecoder(nn.Module):
    """A linear layer to a small map, then doubling of the size and a convolution until the image is reached.

    Args:
        width: D.
        channels: C.
        size: H and W.
        hidden: channels of the last map before the image; each one before it has twice as many, up to 8 times.
    """

    def __init__(self, width: int, channels: int, size: tuple[int, int], hidden: int) -> None:
        super().__init__()
        doublings = max(1, round(math.log2(max(min(size) / SMALLEST, 2))))
        self.size, self.first = size, tuple(-(-side // 2**doublings) for side in size)
        widths = [hidden * min(2 ** (doublings - 1 - i), 8) for i in range(doublings)] + [hidden]
        self.start = nn.Linear(width, widths[0] * self.first[0] * self.first[1])
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """float[B,D] to float[B,C,H,W]."""
        maps = self.start(features).unflatten(1, (-1, *self.first))
        height, width = self.size
        return self.layers(maps)[:, :, :height, :width]
