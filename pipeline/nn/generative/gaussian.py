"""Latent variables with a diagonal Gaussian posterior and a standard normal prior.

Kingma and Welling, "Auto-Encoding Variational Bayes" (ICLR 2014, arXiv 1312.6114); importance-weighted bound: Burda et
al. (ICLR 2016, 1509.00519), eq. 8.
Shape letters: B samples, Z channels of the code, h and w its height and width, K draws.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.nn.generative.pixels import normal

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of what an encoder may say (those of the latent diffusion models' code)."""


class Posterior(NamedTuple):
    """q(z | x)."""

    mean: Tensor
    """float32[B,Z,h,w]."""
    log_std: Tensor
    """float32[B,Z,h,w]."""

    @classmethod
    def of(cls, coded: Tensor) -> Posterior:
        """From [B,2Z,h,w]: means, then logarithms of variances."""
        mean, log_variance = coded.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE) / 2)

    def draw(self, noise: Tensor) -> Tensor:
        """z for standard normal numbers in its shape."""
        return self.mean + torch.exp(self.log_std) * noise

    def kl(self) -> Tensor:
        """KL(q(z | x) || N(0, 1)) of each number of the code, in nats: [B,Z,h,w]."""
        variance = torch.exp(2 * self.log_std)
        return 0.5 * (self.mean.square() + variance - 1) - self.log_std

    def log_ratio(self, z: Tensor) -> Tensor:
        """log p(z) - log q(z | x), in nats: [B]."""
        zero = torch.zeros_like(z)
        return (normal(z, zero, zero) - normal(z, self.mean, self.log_std)).flatten(1).sum(dim=1)


def importance_weighted(log_weights: Tensor) -> Tensor:
    """log of the mean over K draws of p(x, z) / q(z | x): [K,B] to [B], in nats."""
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))
