"""What cameras and files do: images x float32[B,3,H,W] in [0,1], severity 1 to 5. Constants: ``make_imagenet_c.py``."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.nn.common_corruptions.draw import Draw, between, canvas, fitted, scale_of
from pipeline.nn.common_corruptions.filters import mirror, sampled, smooth, symmetric
from pipeline.nn.common_corruptions.levels import to_levels

BOX = Image.Resampling.BOX


def brightness(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """More light: the V of HSV is raised. Hue and saturation stay, so all three colours grow by one factor."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-6), brighter)


def saturate(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Less or more colour: the S of HSV is changed. What has no hue counts as red, as in scikit-image."""
    factor, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = x.amax(dim=1, keepdim=True)
    depth = value - x
    range_ = depth.amax(dim=1, keepdim=True)
    saturation = range_ / value.clamp_min(1e-6)
    changed = (saturation * factor + more).clamp(0, 1)
    red = value * changed * x.new_tensor((0.0, 1.0, 1.0)).view(3, 1, 1)
    return value - torch.where(range_ > 0, depth / range_.clamp_min(1e-6) * value * changed, red)


def contrast(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Everything nearer to the mean colour."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean


def elastic_transform(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Stretched, as by a random affine map, and then like rubber: places move by smooth noise."""
    strength, sigma, affine = (
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    )[severity - 1]  # 244 is the authors' number
    (height, width), scale = x.shape[-2:], scale_of(x)
    row, column = (torch.arange(side, device=x.device, dtype=x.dtype) for side in (height, width))
    grid = torch.stack(torch.broadcast_tensors(column, row[:, None]), dim=-1)  # [H,W,2]: x, y
    came = _affine(grid, (width, height), between(draw, -affine * scale, affine * scale, 3, 2))
    x = sampled(x, came[..., 1], came[..., 0], mirror)
    moves = [
        scale * fitted(strength * smooth(between(draw, -1, 1, 1, *canvas(x)), sigma, symmetric, truncate=3), x)[:, 0]
        for _ in range(2)
    ]
    return sampled(x, grid[..., 1] + moves[1], grid[..., 0] + moves[0], symmetric)


def _affine(grid: Tensor, size: tuple[int, int], move: Tensor) -> Tensor:
    """Where in the image each place [H,W,2] of the result comes from, [B,H,W,2].

    The map takes three points about the centre to where ``move`` [B,3,2] moves them.
    """
    centre = torch.tensor([side // 2 for side in size], dtype=torch.float64)
    third = min(size) // 3
    points = centre + third * torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64)
    moved = points + move.double().cpu()
    ones = torch.ones(3, 1, dtype=torch.float64)
    # [moved, 1] A = points: from the result back to the image, without inverting.
    back = torch.linalg.lstsq(torch.cat([moved, ones.expand(len(move), 3, 1)], dim=2), points.expand(len(move), 3, 2))
    matrix = back.solution.to(grid)
    return grid @ matrix[:, None, :2] + matrix[:, None, 2:]


def pixelate(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Fewer pixels, then as many as before."""
    part = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]

    def coarse(image: Image.Image) -> Image.Image:
        small = (max(1, int(image.width * part)), max(1, int(image.height * part)))
        return image.resize(small, BOX).resize(image.size, BOX)

    return _each(x, coarse)


def jpeg_compression(x: Tensor, severity: int, draw: Draw) -> Tensor:
    """Stored as a JPEG of low quality."""
    quality = (25, 18, 15, 10, 7)[severity - 1]

    def kept(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, kept)


def _each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """What Pillow makes of each image."""
    images = to_levels(x).permute(0, 2, 3, 1).cpu().numpy()
    made = np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
    return torch.from_numpy(made).permute(0, 3, 1, 2).to(x.device, x.dtype) / 255
