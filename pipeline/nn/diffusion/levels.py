"""Noise levels: schedules of a discrete process, grids for sampling, and the reverse process between neighbours.

A level is a pair (a, s) with a^2 + s^2 = 1: the noised image is x = a * image + s * noise. Everything else is named
after it: SNR = (a / s)^2, EDM's sigma = s / a (with x / a as its noised image), alpha-bar = a^2. All in float64; what
is half precision or even rounded to float32 too early adds the wrong noise at the clean end.

Schedules: linear, Ho et al. 2020 (arXiv 2006.11239), rescaled to any number of steps; cosine, Nichol and Dhariwal
2021 (2102.09672); sigmoid, Jabri et al. 2022 (2212.11972); zero terminal SNR, Lin et al. 2023 (2305.08891), alg. 1.

Shape letters: B samples, N levels.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError

ScheduleName = Literal["linear", "cosine", "sigmoid"]
Spacing = Literal["leading", "trailing", "linspace", "karras"]

TIME_SCALE = 1000.0
"""Networks are told the time on this scale, whatever the number of steps (improved-diffusion's rescale_timesteps)."""
MAX_BETA = 0.999
RHO, SIGMA_MIN, SIGMA_MAX = 7.0, 0.002, 80.0
"""Of Karras et al. 2022 (arXiv 2206.00364), table 1."""


class Level(NamedTuple):
    """Noise levels of B samples, each float64[B]; or of all samples alike, each float64[]."""

    a: Tensor
    s: Tensor
    time: Tensor
    """What the network is told."""

    @property
    def snr(self) -> Tensor:
        """Signal to noise; infinite where there is no noise."""
        return (self.a / self.s) ** 2

    @property
    def sigma(self) -> Tensor:
        """EDM's noise level; infinite where there is no signal."""
        return self.s / self.a

    def like(self, x: Tensor) -> Level:
        """Shaped to multiply ``x`` [B,...]; still float64."""
        return Level(*(onto(v, x.device).reshape(-1, *[1] * (x.ndim - 1)) for v in self))


def add_noise(image: Tensor, noise: Tensor, level: Level) -> Tensor:
    """The noised image, never below float32: [B,...]."""
    a, s, _ = level.like(image)
    dtype = torch.promote_types(image.dtype, torch.float32)
    return a.to(dtype) * image + s.to(dtype) * noise


class Levels:
    """N noise levels, the cleanest first, and the Gaussian steps from each to the one before it (or to the image).

    Args:
        a: float64[N], falling.
        s: float64[N], rising, with a^2 + s^2 = 1.
        time: float64[N], what the network is told.
    """

    def __init__(self, a: Tensor, s: Tensor, time: Tensor) -> None:
        assert a.dtype == s.dtype == time.dtype == torch.float64 and len(a) >= 2, (a.dtype, len(a))
        self.a, self.s, self.time = a, s, time
        before_a = torch.cat([a.new_ones(1), a[:-1]])
        before_s = torch.cat([s.new_zeros(1), s[:-1]])
        ratio = a / before_a  # sqrt(alpha_t)
        self.beta = (s**2 - ratio**2 * before_s**2).clamp(min=0.0)
        self.image_part = self.beta * before_a / s**2
        """Of the posterior's mean, c1."""
        self.noised_part = before_s**2 * ratio / s**2
        """Of the posterior's mean, c2."""
        self.variance = self.beta * before_s**2 / s**2
        """Of the posterior q(x_before | x, image): zero at the first level, beyond which is the image itself."""
        # A step to the image has no variance; its decoder takes the next level's (Nichol and Dhariwal's code).
        self.log_small = self.variance[[1, *range(1, len(a))]].log()
        self.log_large = torch.cat([self.variance[1:2], self.beta[1:]]).log()
        self.log_beta = self.beta.log()
        """The upper end of a learned variance; unlike ``log_large`` also at the first level."""

    def __len__(self) -> int:
        return len(self.a)

    def at(self, index: Tensor) -> Level:
        """The levels numbered ``index``, int64[B] or int64[], on its device."""
        return Level(*(of(v, index) for v in (self.a, self.s, self.time)))

    def subset(self, index: Tensor) -> Levels:
        """The chain over some levels only, int64[N'], rising."""
        return Levels(self.a[index], self.s[index], self.time[index])


def of(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a float64[N] table that is kept on the CPU, on the device of ``index``."""
    return onto(table, index.device)[index]


def onto(values: Tensor, device: torch.device) -> Tensor:
    """On the device; towards an accelerator without waiting for it, as small tables are copied aside at once."""
    return values.to(device, non_blocking=device.type != "cpu")


def schedule(name: ScheduleName, steps: int, *, zero_terminal_snr: bool = False) -> Levels:
    """The levels of a discrete process.

    Args:
        name: of the schedule.
        steps: N, at least 2.
        zero_terminal_snr: rescale so that the last level is pure noise.
    """
    if name == "linear":
        scale = 1000.0 / steps
        beta = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64).clamp(max=MAX_BETA)
    else:
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        kept = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 if name == "cosine" else _sigmoid(u)
        beta = (1 - kept[1:] / kept[:-1]).clamp(max=MAX_BETA)
    alpha_bar = torch.cumprod(1 - beta, 0)
    a = alpha_bar.sqrt()
    if zero_terminal_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return Levels(a, (1 - a**2).sqrt(), torch.arange(steps, dtype=torch.float64) * (TIME_SCALE / steps))


def _sigmoid(u: Tensor) -> Tensor:
    """Start -3, end 3, temperature 1: from 1 at u = 0 to 0 at u = 1."""
    first, last = torch.sigmoid(torch.tensor([-3.0, 3.0], dtype=torch.float64))
    return (last - torch.sigmoid(6 * u - 3)) / (last - first)


def from_sigma(sigma: Tensor) -> Level:
    """EDM's noise level in our terms: float64, any shape. The network is told ln(sigma) / 4."""
    assert sigma.dtype == torch.float64
    a = (1 + sigma**2).rsqrt()
    return Level(a, sigma * a, sigma.log() / 4)


def from_log_snr(log_snr: Tensor) -> Level:
    """float64, any shape. The network is told the negative logarithm, VDM's gamma."""
    return Level(torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt(), -log_snr)


def on_line(u: Tensor) -> Level:
    """The point (1 - u) image + u noise of a straight line, scaled to a^2 + s^2 = 1: float64, any shape."""
    length = torch.hypot(1 - u, u)
    return Level((1 - u) / length, u / length, u * TIME_SCALE)


def karras_sigmas(steps: int, low: float, high: float) -> Tensor:
    """EDM's grid, eq. 5: float64[N], rising from ``low`` to ``high``; even in sigma^(1/7)."""
    part = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (low ** (1 / RHO) + part * (high ** (1 / RHO) - low ** (1 / RHO))) ** RHO


def edm_grid(steps: int) -> Levels:
    """The levels that EDM samples at."""
    return Levels(*from_sigma(karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX)))


def spaced(levels: Levels, steps: int, spacing: Spacing) -> Levels:
    """A shorter chain for sampling.

    Args:
        levels: of training.
        steps: levels to visit, 2 to N.
        spacing: "leading" every N // steps-th from the clean end, "trailing" from the noisy end, "linspace" both ends
            (the names are diffusers'); "karras" EDM's grid between the ends, with times interpolated in ln(sigma).

    Raises:
        ConfigError: more steps than levels; Karras' grid up to a level without signal.
    """
    n = len(levels)
    if not 2 <= steps <= n:
        raise ConfigError(f"steps = {steps}: the process has {n} noise levels; take 2 to {n} of them")
    if spacing == "karras":
        sigma = levels.s / levels.a
        if not sigma[-1].isfinite():
            raise ConfigError(
                'spacing = "karras" needs a finite largest sigma, and zero_terminal_snr makes it infinite; '
                'use spacing = "trailing"'
            )
        grid = karras_sigmas(steps, float(sigma[0]), float(sigma[-1]))
        grid[0], grid[-1] = sigma[0], sigma[-1]  # the power and its root may round past the ends
        a, s, _ = from_sigma(grid)
        return Levels(a, s, _interpolate(grid.log(), sigma.log(), levels.time))
    if spacing == "leading":
        index = torch.arange(steps) * (n // steps)
    elif spacing == "trailing":
        index = (n - torch.arange(steps, dtype=torch.float64) * n / steps).round().long().flip(0) - 1
    else:
        index = torch.linspace(0, n - 1, steps, dtype=torch.float64).round().long()
    return levels.subset(index)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through rising ``knots``."""
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    part = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return torch.lerp(values[right - 1], values[right], part)
