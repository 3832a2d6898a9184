"""What denoisers are told beside the image: time, class, text; and dropout that belongs to the sample.

Sinusoidal embedding: Vaswani et al. 2017 in the order of ADM (Dhariwal and Nichol 2021), cosines first. Fourier
features: Tancik et al. 2020, as in NCSN++ (Song et al. 2021). Shape letters: B samples, E embedding, L tokens.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

TimeEmbedding = Literal["sinusoidal", "fourier"]


class Conditions(NamedTuple):
    """Of B samples."""

    time: Tensor
    """float[B]."""
    label: Tensor | None = None
    """int64[B]; the number of classes stands for none."""
    tokens: Tensor | None = None
    """float[B,L,D], of a text encoder."""
    dropout: Tensor | None = None
    """int64[B,n], a key for each dropout layer; None: no dropout."""


class Embedding(nn.Module):
    """Time, and class where there are any, to one vector.

    Args:
        kind: of time.
        frequencies: sines and cosines, even.
        width: E.
        classes: number of classes; 0: none. One more row stands for "no class".
    """

    bands: Tensor

    def __init__(self, kind: TimeEmbedding, frequencies: int, width: int, classes: int) -> None:
        super().__init__()
        half = frequencies // 2
        fixed = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        random = torch.randn(half, dtype=torch.float64) * 16 * 2 * math.pi
        self.register_buffer("bands", (fixed if kind == "sinusoidal" else random).float(), persistent=kind == "fourier")
        self.time1, self.time2 = nn.Linear(frequencies, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.classes = classes

    def forward(self, given: Conditions) -> Tensor:
        """[B,E], in the precision of the weights or of autocast."""
        # float32 whatever the weights are: in bf16 neighbouring times would be one
        angle = given.time.float()[:, None] * self.bands.float()
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.time1.weight.dtype)
        embedded = self.time2(functional.silu(self.time1(waves)))
        if self.label is None:
            return embedded
        assert given.label is not None, "a network with classes is told one, or that there is none"
        return embedded + self.label(given.label)


class SampleDropout(nn.Module):
    """Dropout whose mask is a function of the sample's key: the same on any rank and in any micro-batch.

    A key and the place of the element are mixed by the finaliser of MurmurHash3 (32 bit), in int32 arithmetic, which
    is a fraction of what the counter-based generator of :mod:`pipeline.core.random` costs for whole feature maps.

    Args:
        rate: part that is dropped.
        layer: column of the keys.
    """

    def __init__(self, rate: float, layer: int) -> None:
        super().__init__()
        self.rate, self.layer = rate, layer

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Drop, and scale up what is left; without keys nothing is done."""
        if self.rate == 0 or keys is None:
            return x
        place = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
        h = place ^ keys[:, self.layer, None].to(torch.int32)
        for shift, mask, factor in ((16, 0xFFFF, -2048144789), (13, 0x7FFFF, -1028477387), (16, 0xFFFF, 1)):
            h ^= (h >> shift).bitwise_and_(mask)
            h *= factor
        kept = (h >= int(self.rate * 2**32) - 2**31).view(x.shape)
        return x * kept / (1 - self.rate)
