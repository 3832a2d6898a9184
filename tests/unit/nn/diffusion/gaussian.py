"""Gaussian data N(m, s^2), for which the best denoiser is known, and what a linear sampler makes of it exactly."""

import torch

from pipeline.nn.diffusion.samplers import Denoised

M, S = 0.3, 0.5


def denoiser(m=M, s=S, seen=None):
    """E[image | x], from the joint Gaussian of image and x. Appends each level's time to ``seen``."""

    def denoise(x, level):
        if seen is not None:
            seen.append(float(level.time))
        a, sd, _ = level
        return Denoised(m + a * s**2 / (a**2 * s**2 + sd**2) * (x - a * m))

    return denoise


def outcome(sampler, levels, start=None, m=M, s=S, draws=None, **settings):
    """Exact mean and standard deviation of what ``sampler`` makes of x ~ N(*start), standard normal if not given.

    With this denoiser every sampler is affine in its start and its noises; a batch of unit impulses finds all factors.
    """
    draws = len(levels) if draws is None else draws
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1.0
    count = 0

    def noise():
        nonlocal count
        count += 1
        return torch.eye(draws + 2, dtype=torch.float64)[:, 1 + count : 2 + count]

    extra = (noise,) if draws else ()
    out = sampler(x, levels, denoiser(m, s), *extra, **settings)[:, 0]
    mean, deviation = start or (0.0, 1.0)
    factors = out[1:] - out[0]
    return float(out[0] + mean * factors[0]), float((factors[0] ** 2 * deviation**2 + (factors[1:] ** 2).sum()).sqrt())


def marginal(levels, i=-1, m=M, s=S):
    """Mean and standard deviation of x at a level."""
    a, sd = float(levels.a[i]), float(levels.s[i])
    return a * m, (a**2 * s**2 + sd**2) ** 0.5
