"""Water or mud on the lens: images x float32[B,3,H,W] in [0,1], severity 1 to 5.

Constants: ``make_imagenet_c.py``. Water is lit along its edges, which are found by Canny's method (IEEE TPAMI 1986) as
OpenCV does; each image is worked on by itself.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from pipeline.nn.common_corruptions.draw import Draw, canvas, fitted
from pipeline.nn.common_corruptions.filters import smooth

WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
LIGHT = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float64)
"""What lights water from one side."""
CHAMFER = ((1, 0, 1.0), (1, 1, 1.4), (2, 1, 2.1969))
"""Steps of OpenCV's distance with a mask of 5 x 5, and their lengths."""


def spatter(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Drops of water (1 to 3), splashes of mud (4 and 5)."""
    mean, std, sigma, least, amount = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    liquid = smooth(mean + std * draw.normal(1, *canvas(x)), sigma)
    liquid = liquid.where(liquid >= least, 0.0)
    if severity <= 3:
        drops = [_lit(image[0].cpu().numpy()) for image in liquid]
        cover = amount * fitted(torch.from_numpy(np.stack(drops))[:, None].to(x), x)
        return x + cover * x.new_tensor(WATER).view(3, 1, 1)
    cover = smooth((liquid > least).to(x.dtype), amount)
    cover = fitted(cover.where(cover >= 0.8, 0.0), x)
    return x * (1 - cover) + cover * x.new_tensor(MUD).view(3, 1, 1)


def _lit(liquid: np.ndarray) -> np.ndarray:
    """How much light each place of the water throws back, 0 to 1, float32[H,W]."""
    levels = (liquid * 255 + 1e-3).astype(np.uint8)
    far = np.minimum(_distance(edges(levels)), 20)
    near = _equalised((ndimage.uniform_filter(far, 3, mode="mirror") + 1e-5).astype(np.uint8))
    lit = np.clip(np.rint(ndimage.correlate(near.astype(np.float64), LIGHT, mode="mirror")), 0, 255)
    light = levels * np.rint(ndimage.uniform_filter(lit, 3, mode="mirror"))
    return (light / max(light.max(), 1e-12)).astype(np.float32)


def edges(levels: np.ndarray, low: int = 50, high: int = 150) -> np.ndarray:
    """Canny's edges of uint8[H,W], bool: gradients by Sobel, |gx| + |gy|, thinned, kept where a strong one is reached.

    A border pixel has neighbours of no gradient beyond the edge.
    """
    image = levels.astype(np.int64)
    across, down = (np.asarray(ndimage.sobel(image, axis=axis, mode="nearest"), np.int64) for axis in (1, 0))
    size = np.abs(across) + np.abs(down)
    wide = np.pad(size, 1)

    def beside(dy: int, dx: int) -> np.ndarray:
        return wide[1 + dy : wide.shape[0] - 1 + dy, 1 + dx : wide.shape[1] - 1 + dx]

    flat, steep = (
        np.abs(down) < np.tan(np.pi / 8) * np.abs(across),
        np.abs(down) > np.tan(3 * np.pi / 8) * np.abs(across),
    )
    rising = (across ^ down) < 0
    peak = np.where(
        flat, (size > beside(0, -1)) & (size >= beside(0, 1)),
        np.where(
            steep, (size > beside(-1, 0)) & (size >= beside(1, 0)),
            np.where(rising, (size > beside(-1, 1)) & (size > beside(1, -1)),
                     (size > beside(-1, -1)) & (size > beside(1, 1))),
        ),
    )  # fmt: skip
    weak = peak & (size > low)
    groups, count = cast("tuple[np.ndarray, int]", ndimage.label(weak, np.ones((3, 3))))
    strong = np.zeros(count + 1, bool)
    strong[groups[weak & (size > high)]] = True
    return strong[groups] & weak


def _distance(edge: np.ndarray) -> np.ndarray:
    """Length of the shortest way to an edge in steps of :data:`CHAMFER`, up to what counts, float64[H,W]."""
    height, width = edge.shape
    way = np.where(edge, 0.0, 1e4)
    steps = {(a * p, b * q): length for dy, dx, length in CHAMFER for p, q in ((1, 1), (1, -1), (-1, 1), (-1, -1))
             for a, b in ((dy, dx), (dx, dy))}  # fmt: skip
    for _ in range(24):  # 20 is as far as counts, and a step is at least 1
        wide, before = np.pad(way, 2, constant_values=1e4), way
        for (dy, dx), length in steps.items():
            way = np.minimum(way, wide[2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width] + length)
        if np.array_equal(way, before):
            break
    return way


def _equalised(levels: np.ndarray) -> np.ndarray:
    """uint8[H,W] with its histogram made even, as OpenCV: the least level becomes 0."""
    count = np.bincount(levels.ravel(), minlength=256)
    first = count[count > 0][0]
    if first == levels.size:
        return levels
    table = np.rint((count.cumsum() - first) * (255 / (levels.size - first)))
    return np.clip(table, 0, 255).astype(np.uint8)[levels]
