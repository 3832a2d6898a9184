"""From noise to images: ancestral, DDIM, DPM-Solver++(2M) and Heun.

Ho et al. 2020 (arXiv 2006.11239), algorithm 2; Song et al. 2021 (2010.02502), eq. 12; Lu et al. 2022 (2211.01095),
algorithm 2; Karras et al. 2022 (2206.00364), algorithm 1. All walk a chain of levels from the noisiest down and end
at the clean image. The state is float64, whatever the network computes in; clipping happens in ``denoise``, so that
the noise that follows from a clipped image is always derived from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.nn.diffusion.levels import Level, Levels, of, onto

Variance = Literal["small", "large", "learned"]


class Denoised(NamedTuple):
    """What a denoiser makes of a noised image."""

    image: Tensor
    """The expected clean image, [B,C,H,W]."""
    log_variance_part: Tensor | None = None
    """Where the reverse variance lies between the small one (0) and the large one (1), in logarithms; [B,C,H,W]."""


Denoise = Callable[[Tensor, Level], Denoised]
Noise = Callable[[], Tensor]
"""Fresh standard normal numbers in the shape of the images."""


def log_variance(levels: Levels, index: Tensor, variance: Variance, part: Tensor | None, like: Tensor) -> Tensor:
    """Logarithm of the reverse step's variance at the levels ``index`` [B] or [], shaped to go with ``like``."""

    def shaped(table: Tensor) -> Tensor:
        return onto(of(table, index), like.device).reshape(-1, *[1] * (like.ndim - 1))

    if variance == "learned":
        assert part is not None, "the denoiser gives no variance"
        return torch.lerp(shaped(levels.log_small), shaped(levels.log_beta), part.double())
    return shaped(levels.log_small if variance == "small" else levels.log_large)


def ancestral(x: Tensor, levels: Levels, denoise: Denoise, noise: Noise, *, variance: Variance) -> Tensor:
    """Sample the reverse chain; ``noise`` is drawn once per step, but for the last.

    Args:
        x: noise of the last level, float64[B,C,H,W].
        levels: N levels; N evaluations of the network.
        denoise: the network.
        noise: fresh noise.
        variance: of the steps.
    """
    for i in range(len(levels) - 1, -1, -1):
        index = torch.tensor(i)
        found = denoise(x, levels.at(index))
        x = levels.image_part[i] * found.image + levels.noised_part[i] * x
        if i > 0:
            log = log_variance(levels, index, variance, found.log_variance_part, x)
            x = x + (log / 2).exp() * noise()
    return x


def ddim(x: Tensor, levels: Levels, denoise: Denoise, noise: Noise, *, eta: float = 0.0) -> Tensor:
    """``eta`` = 0 is deterministic and draws no noise; 1 is ancestral sampling with the small variance."""
    for i in range(len(levels) - 1, -1, -1):
        image = denoise(x, levels.at(torch.tensor(i))).image
        if i == 0:
            return image
        a, s = float(levels.a[i - 1]), float(levels.s[i - 1])
        implied = (x - levels.a[i] * image) / levels.s[i]
        sigma = eta * float(levels.variance[i]) ** 0.5
        x = a * image + (s**2 - sigma**2) ** 0.5 * implied
        if eta > 0:
            x = x + sigma * noise()
    raise AssertionError("a chain has levels")


def dpm_solver(x: Tensor, levels: Levels, denoise: Denoise) -> Tensor:
    """DPM-Solver++(2M): one evaluation per level, second order; first order at both ends.

    The last step, to the clean image, has an infinite logarithmic length, where the formula's limit is the image.
    """
    log_ratio = levels.a.log() - levels.s.log()  # lambda; -inf at a level without signal
    before: Tensor | None = None
    for i in range(len(levels) - 1, -1, -1):
        image = denoise(x, levels.at(torch.tensor(i))).image
        if i == 0:
            return image
        step = log_ratio[i - 1] - log_ratio[i]
        guess = image
        # After a level without signal the last step was infinitely long: nothing to extrapolate over.
        if before is not None and log_ratio[i + 1].isfinite():
            r = step / (log_ratio[i] - log_ratio[i + 1])
            guess = image + r / 2 * (image - before)
        x = levels.s[i - 1] / levels.s[i] * x - levels.a[i - 1] * torch.expm1(-step) * guess
        before = image
    raise AssertionError("a chain has levels")


def heun(x: Tensor, levels: Levels, denoise: Denoise, *, straight: bool = False) -> Tensor:
    """The probability flow by Heun's method: 2N - 1 evaluations of the network, the last step Euler's.

    Args:
        x: noise of the last level, float64[B,C,H,W].
        levels: N levels.
        denoise: the network.
        straight: walk (1 - t) image + t noise in t, as flow matching has it; else EDM's y = x / a in sigma, for which
            there must be signal at every level.
    """
    scale = levels.a + levels.s if straight else levels.a
    t = levels.s / scale
    assert t.isfinite().all(), "the generator has seen to it that there is signal at every level"
    y = x / scale[-1]
    for i in range(len(levels) - 1, -1, -1):
        slope = (y - denoise(scale[i] * y, levels.at(torch.tensor(i))).image) / t[i]
        if i == 0:
            return y - t[0] * slope
        ahead = y + (t[i - 1] - t[i]) * slope
        corrected = denoise(scale[i - 1] * ahead, levels.at(torch.tensor(i - 1))).image
        y = y + (t[i - 1] - t[i]) * (slope + (ahead - corrected) / t[i - 1]) / 2
    raise AssertionError("a chain has levels")
