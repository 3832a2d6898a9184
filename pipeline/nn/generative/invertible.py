"""Layers of normalising flows: each maps images to images of the same size, knows its log-determinant, and its inverse.

Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (NeurIPS 2018, arXiv 1807.03039), table 1
and section 3; details after the authors' code. What is transformed is at least float32, whatever the weights are held
in and whatever surrounds the layer; only networks inside couplings run in lower precision.
Shape letters: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.dist.collectives import all_reduce

RATE = 3.0
"""Logarithms of scales are this many times their parameters, which so learn faster (the code's "logscale_factor")."""
SMALL = 1e-6
"""Added to standard deviations that are divided by."""


class Coded(NamedTuple):
    """Images as a flow sees them."""

    noise: Tensor
    """Standard normal if the images come from the model: at least float32[B,D]."""
    log_det: Tensor
    """Logarithm of the determinant of the noise's Jacobian, in nats: [B]."""
    features: Tensor
    """Of hidden layers, pooled over places: float[B,F]."""

    @property
    def log_density(self) -> Tensor:
        """Of the images, in nats: [B]."""
        return standard_normal(self.noise) + self.log_det


def standard_normal(z: Tensor) -> Tensor:
    """Logarithm of the density of [B,...], in nats: [B]."""
    flat = z.flatten(1)
    return -0.5 * (flat.square() + torch.log(flat.new_tensor(2 * torch.pi))).sum(dim=1)


def wide(x: Tensor) -> Tensor:
    """In float32, or more where it has more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squeeze(x: Tensor) -> Tensor:
    """Squares of two by two pixels as channels: [B,C,H,W] to [B,4C,H/2,W/2]."""
    return functional.pixel_unshuffle(x, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return functional.pixel_shuffle(x, 2)


class ActNorm(nn.Module):
    """A shift and a scale for each channel, which begin as those that make the first images' channels standard normal.

    The start, which depends on data, is kept beside what is learned: parameters begin at zero on every rank, and no
    optimizer or moving average has to be told.

    Args:
        channels: C.
    """

    start_shift: Tensor
    start_log_scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        for name in ("start_shift", "start_log_scale"):
            self.register_buffer(name, torch.zeros(channels))
        self.starting = False
        """The next images that come decide the start."""

    def _affine(self) -> tuple[Tensor, Tensor]:
        shift = wide(self.start_shift) + wide(self.shift)
        return shift.view(-1, 1, 1), (wide(self.start_log_scale) + RATE * wide(self.log_scale)).view(-1, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x + shift) * scale of [B,C,H,W], and the log-determinant, []."""
        if self.starting:
            self._start(x)
        shift, log_scale = self._affine()
        return (wide(x) + shift) * log_scale.exp(), log_scale.sum() * (x.shape[2] * x.shape[3])

    def inverse(self, y: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        shift, log_scale = self._affine()
        return wide(y) * (-log_scale).exp() - shift

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """Of what all ranks see, each its own samples; the first moment before the second, so that neither cancels."""
        rows = x.double().transpose(0, 1).flatten(1)
        count = all_reduce(rows.new_tensor([rows.shape[1]]))
        mean = all_reduce(rows.sum(dim=1)) / count
        variance = all_reduce((rows - mean[:, None]).square().sum(dim=1)) / count
        self.start_shift.copy_(-mean - self.shift)
        self.start_log_scale.copy_(-torch.log(variance.sqrt() + SMALL) - RATE * self.log_scale)
        self.starting = False


class InvertibleConv(nn.Module):
    """The same square matrix at every place, P L (U + diag(s)), which begins as a rotation drawn at random.

    Args:
        channels: C.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("order", permutation.argmax(dim=1))
        self.register_buffer("sign", diagonal.sign().float())
        self.lower, self.upper = (nn.Parameter(part.float()) for part in (lower.tril(-1), upper.triu(1)))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def matrix(self) -> Tensor:
        """At least float32[C,C]."""
        log_diagonal, sign = wide(self.log_diagonal), wide(self.sign)
        lower = wide(self.lower).tril(-1) + torch.eye(len(sign), device=sign.device, dtype=log_diagonal.dtype)
        upper = wide(self.upper).triu(1) + torch.diag(sign * log_diagonal.exp())
        return (lower @ upper)[self.order]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product with [B,C,H,W], and the log-determinant, []."""
        with torch.autocast(x.device.type, enabled=False):
            y = _at_each_place(wide(x), self.matrix())
        return y, wide(self.log_diagonal).sum() * (x.shape[2] * x.shape[3])

    def inverse(self, y: Tensor) -> Tensor:
        """[B,C,H,W] to the same; the matrix is inverted in float64."""
        with torch.autocast(y.device.type, enabled=False):
            return _at_each_place(wide(y), self.matrix().double().inverse())


def _at_each_place(x: Tensor, matrix: Tensor) -> Tensor:
    """The product of [C,C] with the channels of [B,C,H,W], in the type of ``x``, with channels last in memory."""
    return functional.linear(x.permute(0, 2, 3, 1), matrix.to(x.dtype)).permute(0, 3, 1, 2)
