"""Whether classes are clusters of the features: k-means without labels, then compared with them.

k-means on unit vectors, several starts, and the three measures of the deep-clustering literature (Chang et al., "Deep
Adaptive Image Clustering", ICCV 2017, section 4.1): normalised mutual information by the arithmetic mean of entropies,
the adjusted Rand index, and the accuracy under the best matching of clusters and classes (Kuhn 1955).
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field
from sklearn.cluster import KMeans

from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._clusters import ClusterConfig, Extra, Given, check_clusters, measured


class Config(ClusterConfig):
    """Settings of the clustering."""

    starts: Annotated[int, Field(ge=1)] = 10
    """The best of so many by the sum of squared distances; labels are not looked at."""


class Clustering(Evaluation):
    """Reports "clustering/nmi", "clustering/ari" and "clustering/accuracy".

    The accuracy counts samples of clusters that got no class as wrong, so that more clusters than classes do not help.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """One stream."""
        return self.config.uses()

    def check(self, ctx: EvalContext) -> None:
        """No more clusters than samples."""
        check_clusters("clustering", self.config, ctx)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Cluster, and compare with the classes."""
        yield from measured("clustering", self.config, ctx, self.cluster)

    def cluster(self, given: Given) -> tuple[np.ndarray, Extra]:
        """k-means of unit vectors: int64[N]."""
        starts, seed = self.config.starts, self.config.seed
        model = KMeans(given.clusters, n_init=starts, random_state=seed)  # pyright: ignore[reportArgumentType]
        return model.fit_predict(given.x), {}
