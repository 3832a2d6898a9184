"""How likely pixels are: densities of dequantised values, and probabilities of the 256 values themselves.

Uniform dequantisation: Theis et al., "A note on the evaluation of generative models" (ICLR 2016, arXiv 1511.01844),
section 3.1: a density of value + u, u uniform, has a mean logarithm that is a lower bound on that of the probability of
the value. Discretised logistic: Salimans et al., "PixelCNN++" (ICLR 2017, 1701.05517), eq. 2.
Shape letters: B samples, C channels, H height, W width, D = CHW.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

HALF_BIN = 1 / 255
"""Half the distance of neighbouring values on the scale from -1 to 1."""
DEQUANTISED = math.log2(128)
"""Bits per dimension between a density on the scale from -1 to 1 and one of the 256 values, which lie 1/128 apart."""

NARROW = 1e-4
"""Bins of this width on the scale of a distribution: log(1 - exp(-w)) is log(w) - w / 2 to 4e-10."""


def dequantise(image: Tensor, uniform: Tensor) -> Tensor:
    """uint8[B,C,H,W] and numbers from 0 to 1 in its shape to (image + uniform) / 128 - 1, float32, from -1 to 1."""
    return (image.float() + uniform) / 128 - 1


def quantise(x: Tensor) -> Tensor:
    """The value whose bin ``x`` lies in, the nearest for what lies outside: uint8, of the shape of ``x``."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def bits_of_density(log_density: Tensor, dims: int) -> Tensor:
    """Logarithm of the density of dequantised images in nats, [B], to bits per dimension: [B]."""
    return -log_density / (dims * math.log(2)) + DEQUANTISED


def bits(log_probability: Tensor, dims: int) -> Tensor:
    """Logarithm of a probability in nats, [B], to bits per dimension: [B]."""
    return -log_probability / (dims * math.log(2))


def normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Logarithm of the density of a normal distribution, elementwise, in nats."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def logistic(image: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float = HALF_BIN) -> Tensor:
    """Logarithm of the probability of each value under a discretised logistic distribution, elementwise, in nats.

    Args:
        image: values 0 to 255 as k / 127.5 - 1; of other numbers of values likewise, from -1 to 1.
        mean: on the same scale.
        log_scale: of the logistic distribution.
        half_bin: half the distance of neighbouring values.

    With s = sigmoid, s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)): exact however improbable the bin, without a floor, and
    with a finite gradient however wide the distribution. The outermost bins are open.
    """
    inverse = torch.exp(-log_scale)
    low, high = (image - mean - half_bin) * inverse, (image - mean + half_bin) * inverse
    below, above = functional.logsigmoid(high), functional.logsigmoid(-low)
    inside = below + above + _log_width(math.log(2 * half_bin) - log_scale)
    return torch.where(image < -0.999, below, torch.where(image > 0.999, above, inside))


def _log_width(log_width: Tensor) -> Tensor:
    """log(1 - exp(-w)) for log(w); of small w by log(w) - w / 2, to w^2 / 24, since w itself may be rounded to zero."""
    width = torch.exp(log_width)
    return torch.where(width < NARROW, log_width - width / 2, torch.log(-torch.expm1(-width.clamp(min=NARROW))))
