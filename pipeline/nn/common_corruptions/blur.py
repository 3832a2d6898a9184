"""Blur: images x float32[B,3,H,W] in [0,1], severity 1 to 5. Constants: ``make_imagenet_c.py``, for 224 pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.nn.common_corruptions.draw import Draw, between, scale_of
from pipeline.nn.common_corruptions.filters import enlarge, mirror, smooth, streaks
from pipeline.nn.common_corruptions.levels import stored

ZOOMS = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
"""Last and step of the enlargements that are averaged."""


def gaussian_blur(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """A lens out of focus, smoothly."""
    return smooth(x, (1, 2, 3, 4, 6)[severity - 1] * scale_of(x))


def defocus_blur(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """A lens out of focus: the mean over a disk."""
    radius, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    kernel = disk(radius, soft, scale_of(x)).to(x)
    half, (height, width) = len(kernel) // 2, x.shape[-2:]
    row, column = (mirror(torch.arange(-half, side + half, device=x.device), side) for side in (height, width))
    padded = x[:, :, row][:, :, :, column]
    return functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(x)


def disk(radius: int, soft: float, scale: float) -> Tensor:
    """The disk that is averaged over, its edge smoothed a little; its parts add up to 1, float32[2h+1,2h+1]."""
    half = math.ceil(max(8, radius) * scale)
    place = np.arange(-half, half + 1)
    full = (place**2 + place[:, None] ** 2 <= (radius * scale) ** 2).astype(np.float64)
    reach = 1 if radius <= 8 else 2
    tap = np.exp(-0.5 * (np.arange(-reach, reach + 1) / soft) ** 2)
    tap, n = tap / tap.sum(), len(place)
    edge = mirror(torch.arange(-reach, n + reach), n).numpy()
    rows = np.stack([share * full[edge[i : i + n]] for i, share in enumerate(tap)]).sum(axis=0)
    both = np.stack([share * rows[:, edge[i : i + n]] for i, share in enumerate(tap)]).sum(axis=0)
    return torch.from_numpy(both / full.sum()).float()


def motion_blur(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """A camera that moved, in a direction of its own for each image."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    scale, degrees = scale_of(x), between(draw, -45, 45, 1).squeeze(1)
    return streaks(x, radius * scale, sigma * scale, degrees)


def zoom_blur(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """A camera that came nearer: the mean over enlargements of the middle."""
    last, step = ZOOMS[severity - 1]
    zooms = np.arange(1, last, step).tolist()
    total = x.clone()
    for zoom in zooms:
        total += enlarge(x, zoom)
    return total / (len(zooms) + 1)


def glass_blur(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Frosted glass: smoothed, then each pixel takes the colour of one nearby, one after the other, then smoothed.

    The authors' code means to swap two pixels. numpy hands it views of their colours, so that it copies one over the
    other; the published images are made so, and ours too.
    """
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    scale = scale_of(x)
    x, reach = stored(smooth(x, sigma * scale)), max(1, round(reach * scale))
    for _ in range(times):
        x = _scattered(x, reach, draw)
    return smooth(x, sigma * scale)


def _scattered(x: Tensor, reach: int, draw: Draw) -> Tensor:
    """Each pixel, from the last to the first, takes the colour of one at most ``reach`` rows and columns away.

    None looks further than ``reach`` columns. So they are done in waves: those of a wave lie a row apart for each
    ``reach`` + 1 columns, cannot see each other, and come after all that they must wait for.
    """
    height, width = x.shape[-2:]
    rows, columns = height - 2 * reach, width - 2 * reach
    if min(rows, columns) < 1:
        return x
    right, down = draw.integers(-reach, reach, rows, columns, 2).unbind(-1)  # in the order in which pixels are done
    canvas = x.movedim(1, -1).clone()
    sample = torch.arange(len(x), device=x.device)[:, None]
    slant = reach + 1
    for wave in range(slant * (rows - 1) + columns):
        least = max(0, -(-(wave - columns + 1) // slant))
        row = torch.arange(least, min(rows - 1, wave // slant) + 1, device=x.device)
        column = wave - slant * row
        here = height - reach - row, width - reach - column
        there = here[0] + down[:, row, column], here[1] + right[:, row, column]
        canvas[sample, here[0], here[1]] = canvas[sample, there[0], there[1]]
    return canvas.movedim(-1, 1)
