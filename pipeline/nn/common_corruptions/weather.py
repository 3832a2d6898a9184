"""Weather: images x float32[B,3,H,W] in [0,1], severity 1 to 5. Constants: ``make_imagenet_c.py``, for 224 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.nn.common_corruptions.draw import Draw, between, canvas, fitted
from pipeline.nn.common_corruptions.filters import enlarge, smooth, streaks
from pipeline.nn.common_corruptions.levels import stored

LUMA = (0.299, 0.587, 0.114)
WIBBLE = 100.0
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
"""Shares of image and frost."""
ICE = (0.80, 0.90, 1.0)
"""Colour of the frost that is drawn."""


def grey(x: Tensor) -> Tensor:
    """Brightness [B,1,H,W] of colours [B,3,H,W], Rec. 601."""
    return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def snow(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Flakes that fall in two directions, over a whitened image."""
    mean, std, zoom, least, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = enlarge(mean + std * draw.normal(1, *canvas(x)), zoom)
    flakes = stored(flakes.where(flakes >= least, 0.0))
    fallen = streaks(flakes, radius, sigma, between(draw, -135, -45, 1).squeeze(1))
    fallen = fitted(stored(fallen), x)  # an image between two programs of the authors'
    white = share * x + (1 - share) * x.maximum(grey(x) * 1.5 + 0.5)
    return white + fallen + fallen.flip(-1, -2)


def fog(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """A cloud by the diamond-square algorithm."""
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    most, (height, width) = x.amax(dim=(1, 2, 3), keepdim=True), canvas(x)
    cloud = fitted(plasma(max(height, width), decay, draw)[:, None, :height, :width], x)
    return (x + amount * cloud) * most / (most + amount)


def plasma(side: int, decay: float, draw: Draw) -> Tensor:
    """A landscape of midpoints that are moved by less and less, from 0 to 1, float32[B,N,N].

    The diamond-square algorithm on a torus, in the authors' order: squares, then two kinds of diamonds.

    Args:
        side: N is the next power of two, at least 2.
        decay: how much less each time.
        draw: chance of the samples.
    """
    size = max(2, 1 << (side - 1).bit_length())
    step, wibble = size, WIBBLE
    land = torch.zeros_like(draw.uniform(1)).double().view(-1, 1, 1).repeat(1, size, size)

    def moved(total: Tensor) -> Tensor:
        """The mean of four, and a number up to the square of ``wibble``."""
        return total / 4 + wibble * between(draw, -wibble, wibble, *total.shape[1:]).double()

    while step >= 2:
        half = step // 2
        corner = land[:, ::step, ::step]
        around = corner + corner.roll(-1, 1)
        land[:, half::step, half::step] = moved(around + around.roll(-1, 2))
        middle = land[:, half::step, half::step]
        beneath, beside = middle + middle.roll(1, 1), corner + corner.roll(-1, 2)
        land[:, ::step, half::step] = moved(beneath + beside)
        beneath, beside = middle + middle.roll(1, 2), corner + corner.roll(-1, 1)
        land[:, half::step, ::step] = moved(beneath + beside)
        step, wibble = half, wibble / decay
    land -= land.amin(dim=(1, 2), keepdim=True)
    return (land / land.amax(dim=(1, 2), keepdim=True)).float()


def frost(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Ice on a window: ImageNet-C's shares of image and ice, but the ice is drawn and not a photograph.

    Ridges of a rough landscape, needles along two directions, and a haze between them. Numbers are not comparable with
    those of ImageNet-C's frost.
    """
    share, ice = FROST[severity - 1]
    height, width = canvas(x)
    land = plasma(max(height, width), 1.6, draw)[:, None, :height, :width]
    veins = (1 - (2 * land - 1).abs()) ** 4
    grain = (draw.normal(1, height, width) > 1.2).to(x.dtype)
    needles = [streaks(grain, 16, 10, between(draw, low, low + 90, 1).squeeze(1)) for low in (-90, 0)]
    haze = smooth(grain, 6)
    cover = (0.35 * haze / 0.115 + 0.6 * veins + 1.2 * needles[0].maximum(needles[1])).clamp(0, 1)
    return share * x + ice * fitted(cover, x) * x.new_tensor(ICE).view(3, 1, 1)
