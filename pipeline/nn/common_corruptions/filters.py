"""Filters and samplings that corruptions are made of, on batches, on any device.

What is separable is a matrix for each axis: any boundary, one product. Shape letters: B images, C channels, H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Fold = Callable[[Tensor, int], Tensor]
"""Takes places on an axis, which may lie outside, and its length, to places on it."""


def nearest(place: Tensor, n: int) -> Tensor:
    """a a | a b c | c c: the edge goes on."""
    return place.clamp(0, n - 1)


def mirror(place: Tensor, n: int) -> Tensor:
    """c b | a b c | b a: mirrored at the last pixel, as OpenCV's BORDER_REFLECT_101 and numpy's "reflect"."""
    period = max(1, 2 * (n - 1))
    place = place % period
    return torch.where(place >= n, period - place, place)


def symmetric(place: Tensor, n: int) -> Tensor:
    """b a | a b c | c b: mirrored at the edge, as SciPy's "reflect"."""
    place = place % (2 * n)
    return torch.where(place >= n, 2 * n - 1 - place, place)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """R x C^T for images [B,C,H,W]: ``rows`` [H',H] acts on the height and ``columns`` [W',W] on the width."""
    return rows.to(x) @ (x @ columns.to(x).T)


def smooth(x: Tensor, sigma: float, fold: Fold = nearest, truncate: float = 4.0) -> Tensor:
    """Gaussian smoothing of [B,C,H,W] with a window of ``truncate`` deviations, as SciPy's ``gaussian_filter``."""
    matrices = (smoothing(side, sigma, fold, truncate) for side in x.shape[-2:])
    return separable(x, *matrices)


@lru_cache(maxsize=64)
def smoothing(n: int, sigma: float, fold: Fold, truncate: float) -> Tensor:
    """The matrix of Gaussian smoothing along an axis of n pixels, float32[n,n]."""
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weight = (-0.5 * (offset.double() / max(sigma, 1e-12)) ** 2).exp()
    place = fold(torch.arange(n)[:, None] + offset, n)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add_(1, place, (weight / weight.sum()).expand(n, -1)).float()


@lru_cache(maxsize=256)
def zooming(n: int, zoom: float) -> Tensor:
    """The matrix that enlarges the middle of an axis of n pixels to all of it, linearly, float32[n,n].

    The middle ceil(n / zoom) pixels become round(ceil(n / zoom) zoom), first on first and last on last (SciPy's
    ``zoom`` of order 1), of which the middle n stay.
    """
    inner = math.ceil(n / zoom)
    outer = round(inner * zoom)
    place = np.arange(n) + (outer - n) // 2
    where = place * ((inner - 1) / max(outer - 1, 1))
    low = np.clip(np.floor(where).astype(int), 0, inner - 1)
    high, part = np.minimum(low + 1, inner - 1), where - low
    matrix, top = np.zeros((n, n)), (n - inner) // 2
    np.add.at(matrix, (np.arange(n), top + low), 1 - part)
    np.add.at(matrix, (np.arange(n), top + high), part)
    return torch.from_numpy(matrix).float()


def enlarge(x: Tensor, zoom: float) -> Tensor:
    """The middle of images [B,C,H,W], enlarged to their size."""
    return separable(x, *(zooming(side, zoom) for side in x.shape[-2:]))


def streaks(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Motion blur as ImageMagick's: half a Gaussian along a line from each pixel, sampled at whole pixels.

    Args:
        x: [B,C,H,W].
        radius: the line is 2 ceil(radius) + 1 pixels long.
        sigma: of the Gaussian.
        degrees: direction of each image, [B].
    """
    (height, width), taps = x.shape[-2:], 2 * math.ceil(radius) + 1
    weight = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(taps)]
    angle = degrees.double() * (math.pi / 180)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    row, column = (torch.arange(side, device=x.device) for side in (height, width))
    channels_last, total = x.movedim(1, -1), torch.zeros_like(x.movedim(1, -1))
    for i, share in enumerate(weight):
        down, right = ((i * part - 0.5).ceil().long() for part in (angle.sin(), angle.cos()))
        here = nearest(row + down[:, None], height)[:, :, None], nearest(column + right[:, None], width)[:, None]
        total += share / sum(weight) * channels_last[sample, *here]
    return total.movedim(-1, 1)


def sampled(x: Tensor, row: Tensor, column: Tensor, fold: Fold) -> Tensor:
    """Images [B,C,H,W] at places [B,H,W] between their pixels, bilinearly; beyond the edge as ``fold`` says."""
    height, width = x.shape[-2:]
    low_row, low_column = row.floor(), column.floor()
    down, right = (row - low_row).unsqueeze(-1), (column - low_column).unsqueeze(-1)
    rows = [fold(low_row.long() + step, height) for step in (0, 1)]
    columns = [fold(low_column.long() + step, width) for step in (0, 1)]
    sample, last = torch.arange(len(x), device=x.device)[:, None, None], x.movedim(1, -1)
    top, bottom = (last[sample, r, columns[0]] * (1 - right) + last[sample, r, columns[1]] * right for r in rows)
    return (top * (1 - down) + bottom * down).movedim(-1, 1)
