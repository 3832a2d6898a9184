"""Whether classes are clusters of the features: k-means without labels, then compared with them.

k-means on unit vectors, several starts, and the three measures of the deep-clustering literature (Chang et al., "Deep
Adaptive Image Clustering", ICCV 2017, section 4.1): normalised mutual information by the arithmetic mean of entropies,
the adjusted Rand index, and the accuracy under the best matching of clusters and classes (Kuhn 1955).
"""

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.dist.group import from_first


class Config(Strict):
    """Settings of the clustering."""

    test: str = "val"
    """Stream whose samples are clustered."""
    clusters: Annotated[int, Field(ge=2)] | None = None
    """Left out: as many as classes occur."""
    starts: Annotated[int, Field(ge=1)] = 10
    """The best of so many by the sum of squared distances; labels are not looked at."""
    seed: int = 0


class Clustering(Evaluation):
    """Reports "clustering/nmi", "clustering/ari" and "clustering/accuracy".

    The accuracy counts samples of clusters that got no class as wrong, so that more clusters than classes do not help.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The stream that is clustered; its labels are looked at afterwards."""
        return Uses({self.config.test: ("image", "label")})

    def check(self, ctx: EvalContext) -> None:
        """No more clusters than samples."""
        samples = ctx.streams[self.config.test].samples
        if self.config.clusters is not None and self.config.clusters > samples:
            raise ConfigError(
                f"clustering.clusters: {self.config.clusters} clusters of {samples} samples (stream "
                f"{self.config.test!r}); set fewer"
            )

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Extract on all ranks, cluster on the first, tell all."""
        found = ctx.features("image", self.config.test)
        yield from from_first(self.measure(functional.normalize(found.x).numpy(), found.label.numpy(), ctx))

    def measure(self, x: np.ndarray, label: np.ndarray, ctx: EvalContext) -> list[Number]:
        """Cluster unit vectors float32[N,D] and compare with int64[N]; nothing on ranks other than the first."""
        if not ctx.place.first:
            return []
        clusters = self.config.clusters or max(2, len(np.unique(label)))
        model = KMeans(clusters, n_init=self.config.starts, random_state=self.config.seed)  # pyright: ignore[reportArgumentType]
        cluster = model.fit_predict(x)
        right, n, split = matched(label, cluster), len(label), self.config.test
        accuracy = float(right.mean())
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        return [
            Number("clustering/nmi", float(normalized_mutual_info_score(label, cluster)), n, split),
            Number("clustering/ari", float(adjusted_rand_score(label, cluster)), n, split),
            Number("clustering/accuracy", accuracy, n, split, error, samples=right),
        ]


def matched(label: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Whether each sample's cluster is matched with its class, under the one-to-one matching that is best: bool[N]."""
    table = contingency_matrix(label, cluster)
    pairs = set(zip(*linear_sum_assignment(table, maximize=True), strict=True))
    _, place = np.unique(label, return_inverse=True)
    _, group = np.unique(cluster, return_inverse=True)
    return np.array([pair in pairs for pair in zip(place, group, strict=True)])
