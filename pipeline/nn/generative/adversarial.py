"""What generators and critics lose, what holds critics back, and how alike the images are that a generator makes.

Non-saturating: Goodfellow et al. 2014 (arXiv 1406.2661), section 3. Hinge: Lim and Ye 2017 (1705.02894), eq. 3; Miyato
et al. 2018 (1802.05957), eq. 17. Wasserstein: Arjovsky et al. 2017 (1701.07875), with the gradient penalty of Gulrajani
et al. 2017 (1704.00028), eq. 3. R1: Mescheder et al. 2018 (1801.04406), eq. 9.
All are sums over samples: nothing depends on how samples are spread over ranks and micro-batches.
Shape letters: B samples, C channels, H height, W width, P places that are judged, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from pipeline.config.strict import PositiveFloat, Strict
from pipeline.dist.collectives import wide

Kind = Literal["non_saturating", "hinge", "wasserstein"]


class PenaltyConfig(Strict):
    """What holds a critic's gradient back."""

    kind: Literal["gradient", "r1"]
    """Of its norm's distance to one, between data and samples; or of its square on the data."""
    weight: PositiveFloat = 10.0
    """Gulrajani's lambda; Mescheder's gamma, half of which counts."""


def critic_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """Of scores of data and samples, [B,P] each: [B], the mean over places."""
    if kind == "non_saturating":
        each = softplus(-real) + softplus(fake)
    elif kind == "hinge":
        each = relu(1 - real) + relu(1 + fake)
    else:
        each = fake - real
    return each.mean(dim=1)


def generator_loss(kind: Kind, fake: Tensor) -> Tensor:
    """Of scores of samples, [B,P]: [B], the mean over places."""
    return (softplus(-fake) if kind == "non_saturating" else -fake).mean(dim=1)


def gradient(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of each image's mean score, [B,C,H,W]; itself with a gradient, where gradients are wanted.

    Args:
        score: [B,C,H,W] to [B,P], of each image by itself.
        x: images.
    """
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(score(x).mean(dim=1).sum(), x, create_graph=wanted)[0]


def penalty(
    config: PenaltyConfig, score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, part: Tensor
) -> Tensor:
    """Of each sample, with its weight, at least float32[B].

    Args:
        config: which.
        score: [B,C,H,W] to [B,P], of each image by itself.
        real: data.
        fake: as many samples.
        part: [B], from 0 to 1, the way from data to samples at which a gradient penalty looks.
    """
    if config.kind == "r1":
        return config.weight / 2 * wide(gradient(score, real)).flatten(1).square().sum(dim=1)
    between = torch.lerp(real, fake, part.view(-1, 1, 1, 1).to(real.dtype))
    return config.weight * (wide(gradient(score, between)).flatten(1).norm(dim=1) - 1).square()


def unlike(features: Tensor) -> Tensor:
    """How far images lie apart: mean squared distance of each second row of [B,D] to the one after it, [].

    A mean over pairs within a micro-batch, so that the mean over micro-batches and ranks is that of all; 0 of one row.
    """
    pairs = features[: len(features) // 2 * 2].unflatten(0, (-1, 2))
    return (pairs[:, 0] - pairs[:, 1]).square().sum() / max(1, len(pairs))


def silent(module: nn.Module, samples: int) -> Tensor:
    """A loss of nothing, with a gradient of zeros for every parameter of ``module``: float32[B]."""
    return (0 * torch.stack([p.float().sum() for p in module.parameters()]).sum()).expand(samples)
