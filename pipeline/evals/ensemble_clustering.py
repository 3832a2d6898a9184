"""An ensemble of clusterings: samples that many clusterings put together belong together.

Evidence accumulation: Fred and Jain, "Combining Multiple Clusterings Using Evidence Accumulation" (TPAMI 2005). The
part of the clusterings that agree on a pair is its similarity (co-association), and average linkage cuts the tree of
these into the clusters that are asked for. Members are k-means, fuzzy c-means and k-means in the latent space of a
variational autoencoder, each from seeds of its own.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._clusters import ClusterConfig, Extra, Given, check_clusters, measured
from pipeline.evals._fuzzy import fuzzy_c_means
from pipeline.evals._latent import Course, latent_means

MOST = 20_000
"""Samples: their pairs take 1.6 GB, and linkage needs them at once."""
Kind = Literal["kmeans", "fuzzy", "latent"]


class Config(ClusterConfig):
    """Settings of the ensemble."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("kmeans", "fuzzy", "latent")
    members: Annotated[int, Field(ge=1)] = 5
    """Clusterings of each kind, from other seeds, each from one start: differences are what an ensemble lives of."""
    fuzzifier: Annotated[float, Field(gt=1)] = 1.1
    """Of fuzzy c-means."""
    latent: Annotated[int, Field(ge=1)] = 10
    """Numbers of the latent space."""
    steps: Annotated[int, Field(ge=1)] = 500
    """Of each autoencoder."""


class EnsembleClustering(Evaluation):
    """Reports "ensemble_clustering/nmi", "ari" and "accuracy" as ``clustering`` does, and "ensemble_clustering/agreed",
    the mean over pairs of how far members agree on them: |2 c - 1|, of the part c that puts a pair together.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """One stream."""
        return self.config.uses()

    def check(self, ctx: EvalContext) -> None:
        """No more clusters than samples, nor more samples than pairs of which fit into memory."""
        check_clusters("ensemble_clustering", self.config, ctx)
        samples = ctx.streams[self.config.test].samples
        if samples > MOST:
            raise ConfigError(
                f"ensemble_clustering.test: {samples} samples (stream {self.config.test!r}) have too many pairs; the "
                f"most is {MOST}; take a part of the stream (keep, where or limit)"
            )

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Cluster, and compare with the classes."""
        yield from measured("ensemble_clustering", self.config, ctx, self.cluster)

    def cluster(self, given: Given) -> tuple[np.ndarray, Extra]:
        """int64[N], and how far members agree."""
        labels = [
            self.member(kind, given, member) for kind in self.config.kinds for member in range(self.config.members)
        ]
        together = co_association(np.stack(labels))
        agreed = float(np.abs(2 * squareform(together, checks=False) - 1).mean()) if len(together) > 1 else 1.0
        return consensus(together, given.clusters), {"agreed": (agreed, True)}

    def member(self, kind: Kind, given: Given, number: int) -> np.ndarray:
        """One clustering, int64[N]."""
        config, seed = self.config, self.config.seed + number
        if kind == "fuzzy":
            return fuzzy_c_means(given, config.fuzzifier, seed, 300, 1e-5).membership.argmax(axis=1)
        x = given.x
        if kind == "latent":
            x = latent_means(x, Course(config.latent, 128, 1.0, config.steps, 256, 3e-3, seed))
        return KMeans(given.clusters, n_init=1, random_state=seed).fit_predict(x)  # pyright: ignore[reportArgumentType]


def co_association(labels: np.ndarray) -> np.ndarray:
    """int64[M,N], labels of M clusterings, to float32[N,N]: the part of them that puts a pair together."""
    together = np.zeros((labels.shape[1],) * 2, np.float32)
    for own in labels:
        together += own[:, None] == own[None]
    return together / len(labels)


def consensus(together: np.ndarray, clusters: int) -> np.ndarray:
    """At most so many clusters by average linkage of 1 - co-association: int64[N], from 0."""
    tree = linkage(squareform(1 - together, checks=False), method="average")
    return fcluster(tree, clusters, criterion="maxclust").astype(np.int64) - 1
