"""What a denoiser is trained to say, how to read the image from it, and how much each noise level counts.

Noise: Ho et al. 2020. Velocity a * noise - s * image: Salimans and Ho 2022 (arXiv 2202.00512). EDM preconditioning:
Karras et al. 2022 (2206.00364), section 5. Flow noise - image, the speed along a straight line: Lipman et al. 2023
(2210.02747) and Liu et al. 2023 (2209.03003). Min-SNR: Hang et al. 2023 (2303.09556).

With x = a * image + s * noise, errors are related by |d noise|^2 = SNR |d image|^2, |d velocity|^2 = (SNR + 1)
|d image|^2, |d flow|^2 = ((a + s) / s)^2 |d image|^2 and |d F|^2 = |d image|^2 / c_out^2, so that a weight stands for
the same loss whatever the target.
Shapes: images [B,C,H,W], levels [B].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.nn.diffusion.levels import Level

Target = Literal["noise", "image", "velocity", "flow", "edm"]
Weight = Literal["uniform", "min_snr", "edm"]

SIGMA_DATA = 0.5
"""Standard deviation of images scaled to -1 to 1, for EDM's preconditioning and weight."""


def to_input(target: Target, x: Tensor, level: Level) -> Tensor:
    """What the network sees of the noised image.

    Unit variance (for data of SIGMA_DATA where ``target`` is "edm"); for "flow" the point on the straight line.
    """
    if target not in ("edm", "flow"):
        return x
    a, s, _ = level.like(x)
    if target == "flow":
        return x / (a + s).to(x.dtype)
    return x * (s**2 + (SIGMA_DATA * a) ** 2).rsqrt().to(x.dtype)


def to_image(target: Target, output: Tensor, x: Tensor, level: Level) -> Tensor:
    """The clean image that the network's ``output`` stands for."""
    a, s, _ = level.like(x)
    if target == "image":
        return output
    if target == "noise":
        return (x - s.to(x.dtype) * output) / a.to(x.dtype)
    if target == "velocity":
        return a.to(x.dtype) * x - s.to(x.dtype) * output
    if target == "flow":
        return (x - s.to(x.dtype) * output) / (a + s).to(x.dtype)
    skip, out = _edm(a, s)
    return skip.to(x.dtype) * x + out.to(x.dtype) * output


def of_training(target: Target, image: Tensor, noise: Tensor, x: Tensor, level: Level) -> Tensor:
    """What the network should say."""
    a, s, _ = level.like(x)
    if target == "image":
        return image
    if target == "noise":
        return noise
    if target == "velocity":
        return a.to(x.dtype) * noise - s.to(x.dtype) * image
    if target == "flow":
        return noise - image
    skip, out = _edm(a, s)
    return ((image - skip * x) / out).to(x.dtype)


def _edm(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out for x = a * image + s * noise (EDM's for x / a, so the first is divided by a)."""
    total = s**2 + (SIGMA_DATA * a) ** 2
    return a * SIGMA_DATA**2 / total, s * SIGMA_DATA * total.rsqrt()


def weight(name: Weight, target: Target, level: Level, gamma: float = 5.0) -> Tensor:
    """Of the squared error of ``target``, float64[B].

    Args:
        name: "uniform" leaves the target's own squared error; "min_snr" counts the image's error min(SNR, gamma) times;
            "edm" counts it (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 times.
        target: what the error is of.
        level: noise levels.
        gamma: of min-SNR.
    """
    a2, s2 = level.a**2, level.s**2
    if name == "uniform":
        return torch.ones_like(a2)
    # Of the image's error, times s^2, so that nothing is divided by a level without noise or without signal.
    clipped, edm = torch.minimum(a2, gamma * s2), (s2 + SIGMA_DATA**2 * a2) / SIGMA_DATA**2
    of_image = clipped if name == "min_snr" else edm
    if target == "noise":
        return of_image / a2
    if target == "velocity":
        return of_image  # SNR + 1 = 1 / s^2
    if target == "image":
        return of_image / s2
    if target == "flow":
        return of_image / (level.a + level.s) ** 2
    return of_image * SIGMA_DATA**2 / (s2 + SIGMA_DATA**2 * a2)
