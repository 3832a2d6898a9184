"""Which noise levels a denoiser is trained on, and which it is sampled and measured on.

Discrete, uniform over the levels of a schedule: Ho et al. 2020. Continuous, log-normal in sigma: Karras et al. 2022
(arXiv 2206.00364), table 1. Shape letters: B samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.nn.diffusion.levels import SIGMA_MAX, SIGMA_MIN, Level, Levels, Spacing, edm_grid, from_sigma, spaced


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
