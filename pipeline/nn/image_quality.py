"""How much an image is like another: PSNR and SSIM.

Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (IEEE TIP 2004): SSIM with their
normal window of 11 pixels, within the image, the mean over channels. Shape letters: B samples, C channels, H height,
W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1e-4
"""Mean squared error of images that are the same: 88 dB."""
WINDOW, WIDTH = 11, 1.5
"""Pixels of SSIM's window, and its standard deviation."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Peak signal to noise ratio of uint8[B,C,H,W], in dB: float32[B]; at most 88."""
    error = (image.float() - other.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255**2 / error.clamp_min(LEAST))


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of uint8[B,C,H,W], at least 11 pixels high and wide, from -1 to 1: float64[B]."""
    x, y = image.double(), other.double()
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * WIDTH**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)

    def mean(values: Tensor) -> Tensor:
        return functional.conv2d(values, window, groups=values.shape[1])

    of_x, of_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - of_x**2, mean(y * y) - of_y**2, mean(x * y) - of_x * of_y
    like = (2 * of_x * of_y + C1) * (2 * both + C2) / ((of_x**2 + of_y**2 + C1) * (var_x + var_y + C2))
    return like.flatten(1).mean(dim=1)
