"""A variational autoencoder of feature vectors: a few numbers that say most of what a feature does.

Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), with Gaussian outputs of variance one.
Shape letters: N samples, B of a batch, D width, L numbers of the latent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

EPSILON = 1e-6


class Course(NamedTuple):
    """How it is trained."""

    latent: int
    hidden: int
    beta: float
    """Weight of the divergence from a standard normal distribution."""
    steps: int
    batch: int
    rate: float
    seed: int


class FeatureVAE(nn.Module):
    """Encoder and decoder of one hidden layer each."""

    def __init__(self, width: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def mean(self, x: Tensor) -> Tensor:
        """[B,D] to the means of the latent, [B,L]."""
        return self.encoder(x).chunk(2, dim=1)[0]

    def loss(self, x: Tensor, noise: Tensor, beta: float) -> Tensor:
        """The negative evidence bound without its constant: mean over samples of the sums over D and over L."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        again = self.decoder(mean + noise * (log_variance / 2).exp())
        error = (again - x).square().sum(dim=1) / 2
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        return (error + beta * divergence).mean()


def latent_means(x: np.ndarray, course: Course) -> np.ndarray:
    """Train one on features float32[N,D], standardised, and give the means of their latents, float32[N,L]."""
    rows = torch.from_numpy(x)
    rows = (rows - rows.mean(dim=0)) / (rows.std(dim=0, unbiased=False) + EPSILON)
    # Of the features' own generator: nothing else of the process is moved, on any rank.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(course.seed)
        model = FeatureVAE(rows.shape[1], course.hidden, course.latent)
        optimizer = torch.optim.Adam(model.parameters(), lr=course.rate)
        for _ in range(course.steps):
            chosen = rows[torch.randint(len(rows), (min(course.batch, len(rows)),))]
            optimizer.zero_grad()
            model.loss(chosen, torch.randn(len(chosen), course.latent), course.beta).backward()
            optimizer.step()
    return model.mean(rows).detach().numpy()
