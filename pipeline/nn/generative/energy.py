"""An energy of noised images whose gradient is the score of their density, and Langevin dynamics that walk down it.

Vincent, "A Connection Between Score Matching and Denoising Autoencoders" (2011); several noise levels and annealed
dynamics: Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution" (NeurIPS 2019, arXiv
1907.05600), eq. 5 and algorithm 1; energies in place of scores: Salimans and Ho, "Should EBMs model the energy or the
score?" (2021). The last step to the expected image: Jolicoeur-Martineau et al. 2021 (2009.05475), section 3.1.
Shape letters: B samples, C channels, H height, W width, L noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.strict import Positive, PositiveFloat, Strict
from pipeline.dist.collectives import wide
from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion.levels import TIME_SCALE
from pipeline.nn.diffusion.targets import SIGMA_DATA
from pipeline.nn.unet import UNet


class LangevinConfig(Strict):
    """How images are made."""

    steps: Positive = 100
    """At each noise level."""
    step: PositiveFloat = 0.2
    """As a part of the noise level's square: Song and Ermon's 2e-5 for their smallest level, 0.01."""
    denoise: bool = True
    """End at the image that is expected of the last state."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the noise that each step adds; 0: walk down the energy."""


def geometric(low: float, high: float, levels: int) -> Tensor:
    """L noise levels, the largest first, each the same part of the one before: float64[L]."""
    return torch.logspace(math.log10(high), math.log10(low), levels, dtype=torch.float64)


def each(values: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to multiply ``x`` [B,...], in its type and on its device."""
    return values.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))


class Energy(nn.Module):
    """E(x, sigma): that of a normal distribution, and what a network adds to it.

    With c = 1 / sqrt(sigma^2 + sigma_data^2) it is c^2 |x|^2 / 2 + (sigma_data / sigma) <c x, f(c x)>. A network that
    says nothing, as it does at first, leaves the score of data with standard deviation ``SIGMA_DATA``.

    Args:
        network: f, from images and conditions to images.
        low: the smallest noise level.
        high: the largest.
    """

    def __init__(self, network: UNet, low: float, high: float) -> None:
        super().__init__()
        self.network, self.low, self.high = network, low, high

    def conditions(self, sigma: Tensor) -> Conditions:
        """What the network is told of levels [B]: 0 for the smallest, ``TIME_SCALE`` for the largest."""
        return Conditions((sigma / self.low).log() * (TIME_SCALE / math.log(self.high / self.low)))

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """c x, about of unit variance."""
        return x * each((sigma**2 + SIGMA_DATA**2).rsqrt(), x)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Energies of noised images [B,C,H,W] at levels float64[B], in nats up to a constant: at least float32[B]."""
        x = self.scaled(wide(x), sigma)
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            said = self.network(x, self.conditions(sigma.to(x.device)))
        product = (x * said).flatten(1).sum(dim=1)
        return x.flatten(1).square().sum(dim=1) / 2 + (SIGMA_DATA / sigma).to(x.device, x.dtype) * product

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """-dE/dx, [B,C,H,W]; itself with a gradient, where gradients are wanted."""
        return score_of(self, x, sigma)


def score_of(energy: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """-dE/dx of any energy, [B,...] and [B] to [B]; see :meth:`Energy.score`."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = wide(x).detach().requires_grad_()
        return -torch.autograd.grad(energy(x, sigma).sum(), x, create_graph=wanted)[0]


def langevin(
    x: Tensor,
    sigmas: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    noise: Callable[[], Tensor],
    config: LangevinConfig,
) -> Tensor:
    """Annealed Langevin dynamics.

    Args:
        x: where it begins, [B,...].
        sigmas: noise levels in the order in which they are visited, float64[L].
        score: of states and levels, [B,...] and float64[B], to [B,...].
        noise: standard normal numbers in the shape of ``x``, new ones each time.
        config: how.

    Returns:
        The last state, or the image that is expected of it.
    """
    for sigma in sigmas:
        level, size = sigma.expand(len(x)), float(config.step * sigma**2)
        for _ in range(config.steps):
            x = x + size / 2 * score(x, level) + config.temperature * math.sqrt(size) * noise()
    level = sigmas[-1].expand(len(x))
    return x + float(sigmas[-1]) ** 2 * score(x, level) if config.denoise else x
