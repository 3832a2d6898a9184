"""Barlow Twins: features of two views are to be correlated each with itself alone, over the batch.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (ICML 2021),
https://arxiv.org/abs/2103.03230. Shape letters: B samples, N of the global batch, E width of the projection.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.protocols import DataFacts, Embeddings, StepContext, StepOutput
from pipeline.dist.collectives import global_covariance, global_mean
from pipeline.nn.projection import projection
from pipeline.nn.two_views import TwoViewConfig, TwoViewObjective, cosines_of

EPS = 1e-5
"""Added to variances, as batch norm does in the authors' code."""


class Config(TwoViewConfig):
    """Settings of Barlow Twins; the defaults are the paper's."""

    layers: Annotated[int, Field(ge=1, le=3)] = 3
    """Of the projector."""
    hidden: Annotated[int, Field(ge=1)] = 8192
    """Width inside the projector."""
    dim: Annotated[int, Field(ge=1)] = 8192
    """E; the wider the better (figure 4)."""
    redundancy: Annotated[float, Field(gt=0)] = 0.0051
    """Weight of correlations between different features (lambda)."""


class BarlowTwins(TwoViewObjective):
    """Encoder and projector. The correlation is that of the global batch, however it is cut."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "barlow_twins")
        self.config = config
        self.head = projection([self.encoder.dim, *[config.hidden] * (config.layers - 1), config.dim], norm=True)

    def encode(self, view: Tensor) -> dict[str, Tensor]:
        """ "embedding", float[B,E]."""
        features = self.encoder(view)
        return {"features": features.detach(), "embedding": self.head(features)}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Squared distance of the correlation matrix from the identity; the two parts of it are metrics, unweighted."""
        rows = embeddings.rows
        off = cross_correlation(rows["embedding"], rows["embedding2"])
        on = (off.diagonal() - 1).square().sum()
        off = off.square().sum() - off.diagonal().square().sum()
        metrics = {"invariance": on.detach(), "redundancy": off.detach()}
        return StepOutput(on + self.config.redundancy * off, metrics, features=rows["features"].detach())

    def agreement(self, rows: dict[str, Tensor]) -> Tensor:
        """Of embeddings."""
        return cosines_of(rows["embedding"], rows["embedding2"])


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation over the global batch of each feature of the first views with each of the second, with gradient.

    Args:
        first: float[B,E] of this rank.
        second: the same samples' second views.

    Returns:
        float32[E,E].
    """
    deviations = [(_variance(x) + EPS).sqrt() for x in (first, second)]
    return global_covariance(first, second, correction=0) / torch.outer(*deviations)


def _variance(x: Tensor) -> Tensor:
    """Over the global batch, biased: float32[E]."""
    return global_mean((x.float() - global_mean(x)).square())
