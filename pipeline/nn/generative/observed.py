"""How pixels lie around what a decoder says, the spread of each channel being learned.

Shape letters: B samples, C channels, H height, W width, D = CHW.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.errors import NonFiniteError
from pipeline.core.random import SampleRandom
from pipeline.nn.generative import pixels

Kind = Literal["normal", "logistic"]
"""A density of dequantised values, or probabilities of the 256."""
LOG_SCALE = -2.0
"""At first."""


class Observed(nn.Module):
    """p(image | decoded).

    Args:
        kind: of distribution.
        shape: C, H, W.
    """

    def __init__(self, kind: Kind, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.shape, self.dims = shape, math.prod(shape)
        self.log_scale = nn.Parameter(torch.full((shape[0],), LOG_SCALE))

    def log_likelihood(self, image: Tensor, decoded: Tensor, random: SampleRandom) -> Tensor:
        """log p(image | decoded) in nats, [B]; where that is a density, of images that ``random`` dequantises.

        Args:
            image: uint8[B,C,H,W].
            decoded: float32[B,C,H,W], about -1 to 1.
            random: used for densities alone.
        """
        log_scale = self.log_scale.float().view(-1, 1, 1)
        if self.kind == "normal":
            each = pixels.normal(pixels.dequantise(image, random.uniform(*self.shape)), decoded, log_scale)
        else:
            each = pixels.logistic(image.float() / 127.5 - 1, decoded, log_scale)
        return each.flatten(1).sum(dim=1)

    def bits(self, log_likelihood: Tensor) -> Tensor:
        """Bits per dimension, [B], for :meth:`log_likelihood`."""
        if self.kind == "normal":
            return pixels.bits_of_density(log_likelihood, self.dims)
        return pixels.bits(log_likelihood, self.dims)

    def image(self, decoded: Tensor, ids: Tensor | None = None) -> Tensor:
        """The likeliest image: uint8[B,C,H,W].

        Args:
            decoded: float32[B,C,H,W].
            ids: int64[B], numbers of what is made, to be named where one is not finite; None: nothing is looked at.

        Raises:
            NonFiniteError: one is not finite.
        """
        if ids is not None and not decoded.isfinite().all():
            bad = ids[~decoded.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(f"sample {bad[0]} (one of {len(bad)}) is not finite; the decoder has diverged")
        if self.kind == "normal":
            return pixels.quantise(decoded)
        return ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
