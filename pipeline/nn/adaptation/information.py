"""How sure a classifier is and how evenly it spreads its answers, without a label: losses, and rules that choose.

Shape letters: N samples, K classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2**22
"""Similarities that are held at a time."""


def entropy(logits: Tensor) -> Tensor:
    """Of each sample's answer, in nats: float[N,K] to [N]."""
    log = logits.log_softmax(dim=1)
    return -(log.exp() * log).sum(dim=1)


def diversity(mean: Tensor) -> Tensor:
    """Entropy of the mean answer, in nats: at most log K, where classes are answered equally often.

    Args:
        mean: probabilities, float[K], the mean over the samples of the global batch.
    """
    return -torch.xlogy(mean, mean).sum()


def batch_nuclear_norm(p: Tensor) -> Tensor:
    """Nuclear norm of the matrix of answers, as a part of the largest that it can be.

    Cui et al., "Towards Discriminability and Diversity: Batch Nuclear-norm Maximization under Label Insufficient
    Situations" (CVPR 2020), equation 9: ||A||_* / N, at most sqrt(N min(N, K)) / N. Here it is divided by that bound:
    1 for sure answers that are spread evenly.

    Args:
        p: probabilities float[N,K].
    """
    n, k = p.shape
    return torch.linalg.svdvals(p).sum() / (n * min(n, k)) ** 0.5


def soft_neighbourhood_density(p: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean entropy of each sample's similarities to all others: the higher, the denser its neighbourhoods are.

    Saito et al., "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood Density"
    (ICCV 2021), equations 2 and 3: cosines of the answers, a softmax over the other samples at temperature 0.05.

    Args:
        p: probabilities float[N,K], N at least 2.
        temperature: of the softmax.
    """
    unit, n = functional.normalize(p, dim=1), len(p)
    total = p.new_zeros(())
    for rows in torch.arange(n, device=p.device).split(max(1, CHUNK // n)):
        similar = unit[rows] @ unit.T / temperature
        similar[torch.arange(len(rows), device=p.device), rows] = -torch.inf
        log = similar.log_softmax(dim=1)
        total = total - torch.nan_to_num(log.exp() * log, nan=0.0).sum()
    return total / n
