"""Images on the device: from uint8 to normalised floats and back, patches, and grids for pictures.

Shape letters: B samples, C channels, H height, W width, N patches, P and Q patch height and width.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x / 255 - mean) / std per channel, always in fp32.

    Args:
        mean: of each channel, for values from 0 to 1.
        std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self._constants = {"mean": tuple(mean), "std": tuple(std)}
        # Not persistent: they come from the config, and an exported encoder must hold timm's keys alone.
        for name, values in self._constants.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalize":
        # Engines that hold the weights in bf16 cast every buffer; 8 bits of mantissa would shift the colours.
        super()._apply(fn, recurse)
        for name, values in self._constants.items():
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32:
                setattr(self, name, torch.tensor(values, device=buffer.device).view(-1, 1, 1))
        return self

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W], or float[B,C,H,W] from 0 to 1, to float32[B,C,H,W]."""
        x = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        return (x - self.mean) / self.std

    def invert(self, x: Tensor) -> Tensor:
        """Normalised float[B,C,H,W] to uint8[B,C,H,W], clipped to what can be shown."""
        return ((x.float() * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B,C,H,W] to [B,N,P*Q*C], patches row by row, inside a patch row, column, channel (the order of MAE)."""
    b, c, h, w = x.shape
    p, q = patch
    x = x.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // p) * (w // q), p * q * c)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`, for ``grid`` rows and columns of patches."""
    b, p, q = len(patches), *patch
    x = patches.reshape(b, *grid, p, q, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, -1, grid[0] * p, grid[1] * q)


def principal_colors(features: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    """Patch features as colours: projections on the first three principal components of the first of ``features``.

    Args:
        features: float[B,N,D] each.
        grid: rows and columns of patches, N together.
        size: height and width of the pictures.

    Returns:
        uint8[B,3,H,W] for each of ``features``, on one common scale.
    """
    first = features[0].float().flatten(0, 1)
    mean = first.mean(dim=0)
    axes = torch.linalg.svd(first - mean, full_matrices=False).Vh[:3].T
    low, high = ((first - mean) @ axes).aminmax(dim=0)
    pictures = []
    for values in features:
        colors = ((values.float() - mean) @ axes - low) / (high - low).clamp_min(1e-12)
        cells = (colors.clamp(0, 1) * 255).to(torch.uint8).unflatten(1, grid).permute(0, 3, 1, 2)
        pictures.append(torch.nn.functional.interpolate(cells, size=tuple(size), mode="nearest"))
    return pictures


def tile(rows: Sequence[Tensor], gap: int = 2) -> np.ndarray:
    """One picture: each entry of ``rows`` is a row of images, white between them.

    Args:
        rows: uint8[B,C,H,W] each, all of one shape; C is 3, or 1 for grey, or more, of which three are shown.
        gap: pixels between images.

    Returns:
        uint8[height,width,3].
    """
    images = torch.stack([row.cpu() for row in rows])
    r, b, c, h, w = images.shape
    images = images.expand(r, b, 3, h, w) if c == 1 else images[:, :, :3]
    canvas = torch.full((r, b, 3, h + gap, w + gap), 255, dtype=torch.uint8)
    canvas[..., :h, :w] = images
    picture = canvas.permute(0, 3, 1, 4, 2).reshape(r * (h + gap), b * (w + gap), 3)
    return picture[: -gap or None, : -gap or None].numpy()
