"""Pixels as mixtures of discretised logistic distributions whose channels depend on each other.

Salimans et al., "PixelCNN++" (ICLR 2017, arXiv 1701.05517), eq. 2 and 3: each component has a mean and a scale for
every channel, and the mean of a channel moves with the values of the channels before it.
Shape letters: B samples, C channels, H height, W width, K components, P numbers that a network says of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.nn.generative import pixels

LEAST_LOG_SCALE = -7.0
"""Narrower a component cannot become (the authors' code)."""
HALF_STEP = 2.0**-25
"""From multiples of 2^-24 to the middle between them, so that a uniform number is neither 0 nor 1."""


class Components(NamedTuple):
    """Of pixels."""

    logits: Tensor
    """[B,K,...]."""
    means: Tensor
    """[B,K,C,...], before the channels' influence on each other."""
    log_scales: Tensor
    """[B,K,C,...]."""
    couplings: Tensor
    """[B,K,C(C-1)/2,...], from -1 to 1: of channel 1 by 0, of 2 by 0 and 1, ..."""


class LogisticMixture:
    """p(pixel | P numbers).

    Args:
        channels: C.
        components: K.
        levels: values of a channel, from 0 on.
    """

    def __init__(self, channels: int, components: int, levels: int = 256) -> None:
        self.channels, self.components, self.levels = channels, components, levels
        self._sizes = (1, channels, channels, channels * (channels - 1) // 2)

    @property
    def numbers(self) -> int:
        """P: logits, then means, scales and couplings, each as [K, ...]."""
        return self.components * sum(self._sizes)

    def scaled(self, value: Tensor, like: Tensor) -> Tensor:
        """Values 0 to levels - 1 to numbers from -1 to 1, of the type of ``like``."""
        return value.to(like.dtype) * (2 / (self.levels - 1)) - 1

    def _split(self, said: Tensor) -> Components:
        """Of [B,P,...], in at least fp32."""
        wide = said.to(torch.promote_types(said.dtype, torch.float32))
        parts = wide.split([self.components * size for size in self._sizes], dim=1)
        logits, means, log_scales, couplings = (part.unflatten(1, (self.components, -1)) for part in parts)
        return Components(logits[:, :, 0], means, log_scales.clamp(min=LEAST_LOG_SCALE), couplings.tanh())

    def _coupled(self, channel: int, own: Components, before: Tensor) -> Tensor:
        """Means of a channel, [B,K,...], where those before it have the values [B,channel,...]."""
        first = channel * (channel - 1) // 2
        mine = own.couplings[:, :, first : first + channel]
        return own.means[:, :, channel] + (mine * before[:, None]).sum(dim=2)

    def log_likelihood(self, image: Tensor, said: Tensor) -> Tensor:
        """log p of each image in nats.

        Args:
            image: uint8[B,C,H,W].
            said: [B,P,H,W].

        Returns:
            At least float32[B].
        """
        own = self._split(said)
        x = self.scaled(image, own.logits)
        means = torch.stack([self._coupled(c, own, x[:, :c]) for c in range(self.channels)], dim=2)
        each = pixels.logistic(x[:, None], means, own.log_scales, 1 / (self.levels - 1)).sum(dim=2)
        return torch.logsumexp(each + own.logits.log_softmax(dim=1), dim=1).flatten(1).sum(dim=1)

    def sample(self, said: Tensor, uniform: Tensor) -> Tensor:
        """Draw a pixel: a component, and in it one channel after the other.

        A logistic number rounded to the nearest value, the outermost taking what lies beyond, is distributed as the
        discretised distribution is.

        Args:
            said: [B,P].
            uniform: float32[B,1+C], multiples of 2^-24 from 0 to 1.

        Returns:
            uint8[B,C].
        """
        own, u = self._split(said.double()), uniform.double() + HALF_STEP
        chosen = drawn(own.logits, u[:, 0])
        row = torch.arange(len(said), device=said.device)
        own = Components(*(part[row, chosen][:, None] for part in own))
        values: list[Tensor] = []
        before = said.new_zeros(len(said), 0, dtype=torch.float64)
        for c in range(self.channels):
            mean, scale = self._coupled(c, own, before)[:, 0], own.log_scales[:, 0, c].exp()
            value = ((mean + scale * torch.logit(u[:, 1 + c]) + 1) * ((self.levels - 1) / 2)).round()
            values.append(value.clamp(0, self.levels - 1).to(torch.uint8))
            before = torch.cat([before, self.scaled(values[-1], before)[:, None]], dim=1)
        return torch.stack(values, dim=1)


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """One of K by its probability: float64[B,K] and [B] between 0 and 1 to int64[B]."""
    reached = logits.softmax(dim=1).cumsum(dim=1)
    return (reached < uniform[:, None] * reached[:, -1:]).sum(dim=1)
