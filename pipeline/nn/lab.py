"""CIE L*a*b* and the colours that a colorizer chooses between.

The colour space is that of sRGB under D65 (CIE 15), with the constants of scikit-image. Bins, soft targets, rebalancing
and the annealed mean: Zhang et al., "Colorful Image Colorization" (ECCV 2016), https://arxiv.org/abs/1603.08511,
section 2. Shape letters: B samples, H height, W width, Q bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 10.0
"""Side of a bin in a and b."""
NEIGHBOURS, SIGMA = 5, 5.0
"""Bins that share a target, and the width of the Gaussian that shares it out."""
LIGHT_BINS = 100
"""Of split-brain autoencoders, which predict lightness in steps of one."""
BINS_OF_B = {
    -9: (8, 8), -8: (4, 8), -7: (2, 9), -6: (0, 9), -5: (-2, 9), -4: (-3, 9), -3: (-4, 9), -2: (-4, 9), -1: (-5, 9),
    0: (-6, 9), 1: (-7, 8), 2: (-7, 8), 3: (-8, 8), 4: (-9, 8), 5: (-9, 7), 6: (-10, 7), 7: (-11, 7), 8: (-11, 7),
    9: (-9, 0), 10: (-7, -5),
}  # fmt: skip
"""First and last bin of b for each bin of a, in units of the grid: the 261 that some 8-bit sRGB colour is nearest to.
(The authors' file has 313, with points at the border of the gamut that no colour is nearest to.)"""

_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
_EDGE, _SLOPE, _SHIFT = 0.008856, 7.787, 16 / 116
"""Where the cube root ends, and the line that takes its place for the darkest colours."""


def to_lab(image: Tensor) -> Tensor:
    """sRGB, uint8[B,3,H,W] or float[B,3,H,W] from 0 to 1, to float32[B,3,H,W]: L to 100, a and b within +-110."""
    if image.dtype == torch.uint8:
        levels = _linear(torch.arange(256, device=image.device, dtype=torch.float32) / 255)
        linear = levels[image.long()]
    else:
        linear = _linear(image.float())
    matrix = linear.new_tensor(_TO_XYZ) / linear.new_tensor(_WHITE)[:, None]
    with torch.autocast(image.device.type, enabled=False):
        xyz = torch.einsum("oc,bchw->bohw", matrix, linear)
    f = torch.where(xyz > _EDGE, xyz.clamp_min(_EDGE).pow(1 / 3), _SLOPE * xyz + _SHIFT)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def to_rgb(lab: Tensor) -> Tensor:
    """float[B,3,H,W] to sRGB, uint8[B,3,H,W]; colours that sRGB has not got are cut off."""
    light, a, b = lab.float().unbind(1)
    y = (light + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], dim=1)
    xyz = torch.where(f > 0.2068966, f.pow(3), (f - _SHIFT) / _SLOPE) * f.new_tensor(_WHITE)[:, None, None]
    linear = torch.einsum("oc,bchw->bohw", torch.linalg.inv(f.new_tensor(_TO_XYZ)), xyz)
    srgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp_min(0.0031308).pow(1 / 2.4) - 0.055, 12.92 * linear)
    return (srgb.clamp(0, 1) * 255).round().to(torch.uint8)


def _linear(x: Tensor) -> Tensor:
    return torch.where(x > 0.04045, ((x + 0.055) / 1.055).pow(2.4), x / 12.92)


def colour_bins() -> Tensor:
    """Centres of the bins, float32[Q,2], a and b."""
    rows = [(a, b) for a, (first, last) in BINS_OF_B.items() for b in range(first, last + 1)]
    return torch.tensor(rows, dtype=torch.float32) * GRID


def soft_bins(ab: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Share colours out over their nearest bins, by a Gaussian of the distance.

    Args:
        ab: float32[N,2].
        bins: float32[Q,2].

    Returns:
        int64[N,5], the nearest bins, nearest first; float32[N,5], their shares, which add up to one.
    """
    with torch.autocast(ab.device.type, enabled=False):
        # |x - y|^2 by one product: distances of up to 300 in fp32, far apart enough from the next bin's.
        distance = bins.square().sum(dim=1) - 2 * ab @ bins.T
    near, index = distance.topk(NEIGHBOURS, dim=1, largest=False)
    near = near + ab.square().sum(dim=1, keepdim=True)
    return index, torch.softmax(-near / (2 * SIGMA**2), dim=1)


def rarity_weights(share: Tensor, part: float) -> Tensor:
    """What colours count, so that rare ones are learnt too (equation 4 of the paper).

    Args:
        share: float[Q], of the colours seen so far, adding up to one.
        part: lambda, how much of the uniform distribution is mixed in; 1 makes all weights one.

    Returns:
        float[Q], inverse to the mixture, and one on average over what was seen.
    """
    weight = 1 / ((1 - part) * share + part / len(share))
    return weight / (share * weight).sum()


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float) -> Tensor:
    """One colour of a distribution: the mean of a sharper one (equation 5); at 1 the mean, at 0 the most likely bin.

    Args:
        logits: float[B,Q,H,W].
        bins: float32[Q,2].
        temperature: T.

    Returns:
        float32[B,2,H,W].
    """
    return torch.einsum("bqhw,qc->bchw", torch.softmax(logits.float() / temperature, dim=1), bins)
