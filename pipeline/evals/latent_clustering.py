"""Clusters in the latent space of a variational autoencoder of the features.

k-means loses its way in many dimensions, most of which say nothing of classes; a small autoencoder of the frozen
features (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014) leaves a few. Jiang et al., "Variational Deep
Embedding" (IJCAI 2017), learn the mixture together with it; here it is k-means on the means, after training.
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field
from sklearn.cluster import KMeans

from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._clusters import ClusterConfig, Extra, Given, check_clusters, measured
from pipeline.evals._latent import Course, latent_means


class Config(ClusterConfig):
    """Settings of the clustering of latents."""

    latent: Annotated[int, Field(ge=1)] = 10
    """Numbers that a feature becomes."""
    hidden: Annotated[int, Field(ge=1)] = 128
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from a standard normal distribution."""
    steps: Annotated[int, Field(ge=1)] = 1000
    batch: Annotated[int, Field(ge=1)] = 256
    rate: Annotated[float, Field(gt=0)] = 3e-3
    """Of Adam."""
    starts: Annotated[int, Field(ge=1)] = 10
    """Of k-means."""

    def course(self, seed: int) -> Course:
        """How one is trained."""
        return Course(self.latent, self.hidden, self.beta, self.steps, self.batch, self.rate, seed)


class LatentClustering(Evaluation):
    """Reports "latent_clustering/nmi", "ari" and "accuracy", as ``clustering`` does."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """One stream."""
        return self.config.uses()

    def check(self, ctx: EvalContext) -> None:
        """No more clusters than samples."""
        check_clusters("latent_clustering", self.config, ctx)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Cluster, and compare with the classes."""
        yield from measured("latent_clustering", self.config, ctx, self.cluster)

    def cluster(self, given: Given) -> tuple[np.ndarray, Extra]:
        """Train on the features themselves, without labels, and cluster the latents: int64[N]."""
        latents = latent_means(given.x, self.config.course(self.config.seed))
        starts, seed = self.config.starts, self.config.seed
        model = KMeans(given.clusters, n_init=starts, random_state=seed)  # pyright: ignore[reportArgumentType]
        return model.fit_predict(latents), {}
