"""Which noise levels a denoiser is trained on, and which it is sampled and measured on.

Discrete, uniform over the levels of a schedule: Ho et al. 2020. Continuous, log-normal in sigma: Karras et al. 2022
(arXiv 2206.00364), table 1; even along a straight line: Ma et al. 2024, "SiT" (2401.08740). Learned: Kingma et al.
2021, "Variational Diffusion Models" (2107.00630), appendix H.
Shape letters: B samples, K features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.nn.diffusion.levels import (
    SIGMA_MAX,
    SIGMA_MIN,
    Level,
    Levels,
    Spacing,
    edm_grid,
    from_log_snr,
    from_sigma,
    karras_sigmas,
    on_line,
    spaced,
)


class Process(ABC):
    """Noise levels by quantile: 0 is the cleanest and 1 the noisiest that training draws."""

    @abstractmethod
    def draw(self, quantile: Tensor) -> Level:
        """Levels float64[B] at ``quantile`` [B], in [0, 1)."""

    @abstractmethod
    def chain(self, steps: int, spacing: Spacing) -> Levels:
        """Levels to sample at.

        Raises:
            ConfigError: the process cannot be walked so.
        """

    @abstractmethod
    def likelihood_chain(self, steps: int | None) -> Levels:
        """Levels to sum the bound over; None: as many as there are.

        Raises:
            ConfigError: a number that is needed is missing, or given where the process has its own.
        """


class Discrete(Process):
    """The levels of a schedule, all as likely."""

    def __init__(self, levels: Levels) -> None:
        self.levels = levels

    def index(self, quantile: Tensor) -> Tensor:
        """int64[B], the number of the level."""
        return (quantile.double() * len(self.levels)).long()

    def draw(self, quantile: Tensor) -> Level:
        """The level that the quantile falls into."""
        return self.levels.at(self.index(quantile))

    def chain(self, steps: int, spacing: Spacing) -> Levels:
        """Some of the levels, or Karras' grid between them."""
        return spaced(self.levels, steps, spacing)

    def likelihood_chain(self, steps: int | None) -> Levels:
        """All levels."""
        if steps is not None:
            raise ConfigError(f"steps = {steps}: this process has its own {len(self.levels)} levels; leave steps out")
        return self.levels


class LogNormal(Process):
    """EDM's: ln(sigma) is normal.

    Args:
        mean: of ln(sigma).
        std: of ln(sigma).
    """

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def draw(self, quantile: Tensor) -> Level:
        """By the inverse of the distribution, at the middle of the cell of 2**-24 that the quantile stands for."""
        return from_sigma((self.mean + self.std * torch.special.ndtri(quantile.double() + 2.0**-25)).exp())

    def chain(self, steps: int, spacing: Spacing) -> Levels:
        """EDM's grid."""
        if spacing != "karras":
            raise ConfigError(f'spacing = "{spacing}": a continuous process has no levels to choose from; use "karras"')
        return edm_grid(steps)

    def likelihood_chain(self, steps: int | None) -> Levels:
        """Even in ln(sigma) between EDM's ends."""
        if steps is None:
            raise ConfigError("a continuous process has no number of levels of its own; set steps, e.g. 1000")
        low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
        return Levels(*from_sigma(torch.linspace(low, high, steps, dtype=torch.float64).exp()))


class Straight(Process):
    """Flow matching's: even along the straight line from the image to noise."""

    def draw(self, quantile: Tensor) -> Level:
        """The quantile is the place on the line."""
        return on_line(quantile.double())

    def chain(self, steps: int, spacing: Spacing) -> Levels:
        """Even along the line, from pure noise; DDIM's steps between its points are Euler's."""
        if spacing != "trailing":
            raise ConfigError(f'spacing = "{spacing}": a straight line is walked evenly from its end; use "trailing"')
        return Levels(*on_line(torch.arange(1, steps + 1, dtype=torch.float64) / steps))

    def likelihood_chain(self, steps: int | None) -> Levels:
        """Even along the line."""
        if steps is None:
            raise ConfigError("a continuous process has no number of levels of its own; set steps, e.g. 1000")
        return self.chain(steps, "trailing")


class Monotone(nn.Module):
    """A rising function of [0, 1] onto itself, and two ends: a line and K sigmoids with positive factors.

    Args:
        ends: initial values.
        width: K.
    """

    def __init__(self, ends: tuple[float, float], width: int = 256) -> None:
        super().__init__()
        self.ends = nn.Parameter(torch.tensor(ends))
        self.line = nn.Parameter(torch.ones(1))
        self.steepness = nn.Parameter(torch.ones(width))
        self.centre = nn.Parameter(torch.randn(width))
        self.height = nn.Parameter(torch.rand(width) * 0.1)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value and slope at ``u`` float64[B], and the ends [2]; all float64."""
        line, steepness, height = (p.double().abs() for p in (self.line, self.steepness, self.height))

        def rise(at: Tensor) -> tuple[Tensor, Tensor]:
            bend = torch.sigmoid(4 * steepness * (2 * at[:, None] - 1) + self.centre.double())
            slope = (height * 8 * steepness * bend * (1 - bend)).mean(dim=1)
            return line * at + (height * bend).mean(dim=1), line + slope

        low, high = rise(torch.tensor([0.0, 1.0], dtype=torch.float64, device=u.device))[0]
        value, slope = rise(u)
        return (value - low) / (high - low), slope / (high - low), self.ends.double()


class Scheduled(NamedTuple):
    """Levels of a learned schedule, with gradient."""

    level: Level
    slope: Tensor
    """Of -log SNR by the quantile, float64[B]."""
    first: Tensor
    """-log SNR of the cleanest level, float64[]."""
    last: Level
    """The noisiest, each [1]."""
    loss: list[Tensor]
    """To be given the loss of each sample, [B], before the backward pass."""


class Learned(Process, nn.Module):
    """VDM's: -log SNR is a rising function that is trained with the denoiser.

    In continuous time the bound depends on its ends alone, which are trained by the bound; what lies between them
    decides how noisy the estimate of the bound is, and is trained to make its square small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = Monotone((-13.3, 5.0))

    def training_levels(self, quantile: Tensor) -> Scheduled:
        """Levels float64[B] for quantiles [B].

        In the backward pass the gradient of a sample's loss L becomes that of L^2 for what lies between the ends, by
        a factor of 2 L; the ends' own stays that of L.
        """
        part, steep, ends = self.gamma(quantile.double())
        loss: list[Tensor] = []
        for inside in (part, steep):
            if inside.requires_grad:
                inside.register_hook(lambda gradient: gradient * (2 * loss[0]))
        low, high = ends.unbind()
        span = high - low
        return Scheduled(from_log_snr(-(low + span * part)), span * steep, low, from_log_snr(-high[None]), loss)

    def _at(self, u: Tensor) -> Tensor:
        part, _, (low, high) = self.gamma(u.double())
        return (low + (high - low) * part).detach()

    def draw(self, quantile: Tensor) -> Level:
        """Without gradient."""
        return from_log_snr(-self._at(quantile))

    def chain(self, steps: int, spacing: Spacing) -> Levels:
        """Even in the quantile, from 0, to 1 or both; or Karras' grid between the ends."""
        device = self.gamma.ends.device
        if spacing == "karras":
            low, high = (self._at(torch.tensor([0.0, 1.0], device=device)) / 2).exp().tolist()
            return Levels(*from_log_snr(-2 * karras_sigmas(steps, low, high).log()))
        first, last = {"leading": (0, steps - 1), "trailing": (1, steps), "linspace": (0, steps)}[spacing]
        u = torch.linspace(first, last, steps, dtype=torch.float64) / steps
        return Levels(*from_log_snr(-self._at(u.to(device)).cpu()))

    def likelihood_chain(self, steps: int | None) -> Levels:
        """Even in the quantile between the ends."""
        if steps is None:
            raise ConfigError("a continuous process has no number of levels of its own; set steps, e.g. 1000")
        return self.chain(steps, "linspace")
