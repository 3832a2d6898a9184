"""The variational bound on the likelihood of discretised images, in bits per dimension, term by term.

Ho et al. 2020 (arXiv 2006.11239), eq. 5 and 13; Nichol and Dhariwal 2021 (2102.09672), sections 3.1 and 3.3;
in continuous time Kingma et al. 2021 (2107.00630), eq. 11 and 15.
Images are integers 0 to 255 mapped to k / 127.5 - 1. Shape letters: B samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.nn.diffusion.levels import Level, Levels, of

HALF_BIN = 1 / 255
"""Half the distance of neighbouring pixel values."""


def normal_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of one Gaussian to another, elementwise, in nats."""
    gap = log_variance2 - log_variance
    return 0.5 * (gap - 1 + (-gap).exp() + (mean - mean2) ** 2 * (-log_variance2).exp())


def log_bin(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of each pixel's bin under a Gaussian, float64, elementwise; the outermost bins are open.

    Computed in the lower tail by ``log_ndtr``, so it is exact however improbable the bin, and needs no floor.
    """
    deviation = (log_variance.double() / 2).exp()
    offset = (image - mean).double()
    low, high = (offset - HALF_BIN) / deviation, (offset + HALF_BIN) / deviation
    # The bin and its mirror image are as probable; take the one that lies left of the mean.
    left, right = torch.where(offset > 0, -high, low), torch.where(offset > 0, -low, high)
    top, bottom = torch.special.log_ndtr(right), torch.special.log_ndtr(left)
    inside = top + torch.log(-torch.expm1(bottom - top))
    below, above = torch.special.log_ndtr(high), torch.special.log_ndtr(-low)
    return torch.where(image < -0.999, below, torch.where(image > 0.999, above, inside))


def per_dimension(nats: Tensor) -> Tensor:
    """Mean over all but the first dimension, in bits: [B]."""
    return nats.flatten(1).mean(dim=1) / math.log(2)


def prior(image: Tensor, levels: Levels) -> Tensor:
    """What the last level still tells of the image: KL(q(x_T | image) || N(0, 1)), bits per dimension, float64[B]."""
    a, s = levels.a[-1].to(image.device), levels.s[-1].to(image.device)
    zero = torch.zeros((), dtype=torch.float64, device=image.device)
    return per_dimension(normal_kl(a * image.double(), 2 * s.log(), zero, zero))


def term(image: Tensor, x: Tensor, levels: Levels, index: Tensor, predicted: Tensor, log_variance: Tensor) -> Tensor:
    """The bound's term at each sample's level, bits per dimension, float64[B].

    KL(q(x_before | x, image) || p(x_before | x)); at the first level the decoder's -log p(image | x).

    Args:
        image: clean, [B,...].
        x: noised, [B,...].
        levels: of the process.
        index: int64[B], the level of each sample.
        predicted: the denoiser's image, [B,...].
        log_variance: of the reverse step, to broadcast against the images.
    """
    shape = (-1, *[1] * (image.ndim - 1))
    c1, c2 = (of(t, index).view(shape) for t in (levels.image_part, levels.noised_part))
    mean = c1 * predicted.double() + c2 * x.double()
    true = c1 * image.double() + c2 * x.double()
    # The posterior's variance is zero at the first level, whose KL is not used.
    nats = normal_kl(true, of(levels.log_small, index).view(shape), mean, log_variance)
    first = (index == 0).view(shape)
    return per_dimension(torch.where(first, -log_bin(image, mean, log_variance), nats))


def continuous(image: Tensor, noise: Tensor, error: Tensor, slope: Tensor, first: Tensor, last: Level) -> Tensor:
    """The bound in continuous time as one level estimates it, bits per dimension, float64[B].

    Args:
        image: clean, [B,...].
        noise: of the cleanest level, which the decoder reads, [B,...].
        error: mean squared error of the predicted noise at a level drawn at random, [B].
        slope: of -log SNR by the quantile at that level, [B].
        first: -log SNR of the cleanest level, [].
        last: the noisiest level.
    """
    levels = 0.5 * slope * error.double() / math.log(2)
    mean = image.double() + (first / 2).exp() * noise.double()
    decoder = per_dimension(-log_bin(image, mean, first))
    a, s, _ = last.like(image)
    zero = torch.zeros((), dtype=torch.float64, device=image.device)
    return levels + decoder + per_dimension(normal_kl(a * image.double(), 2 * s.log(), zero, zero))
