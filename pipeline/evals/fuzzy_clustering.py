"""Fuzzy c-means of the features: every sample belongs to every cluster, to a degree.

Bezdek, "Pattern Recognition with Fuzzy Objective Function Algorithms" (1981): the least sum of u^m d^2 over memberships
u that add up to one for each sample. In many dimensions all distances are alike, and with the usual fuzzifier m = 2
memberships become equal and all centres the mean of the data (Winkler, Klawonn and Kruse, "Fuzzy c-Means in High
Dimensional Spaces", 2011); so the default is 1.1, and a clustering that has collapsed so is told.
"""

import sys
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._clusters import ClusterConfig, Extra, Given, check_clusters, measured
from pipeline.evals._fuzzy import fuzzy_c_means

COLLAPSED = 0.05
"""Partition coefficient, 0 where all memberships are equal, below which nothing was clustered."""


class Config(ClusterConfig):
    """Settings of the fuzzy clustering."""

    fuzzifier: Annotated[float, Field(gt=1)] = 1.1
    """m: k-means as it goes to 1; the larger, the more clusters share their samples."""
    starts: Annotated[int, Field(ge=1)] = 10
    """The best of so many by the sum that is made least; labels are not looked at."""
    iterations: Annotated[int, Field(ge=1)] = 300
    """At most."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-5
    """It ends where no membership changes by more."""


class FuzzyClustering(Evaluation):
    """Reports NMI, ARI and matched accuracy of the clusters to which samples belong most, as "fuzzy_clustering/nmi" and
    so on, and "fuzzy_clustering/partition", Bezdek's coefficient from 0 (all memberships equal) to 1 (as k-means).

    Where that is below 0.05 it says on the terminal that the clusters have collapsed, and what to set.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """One stream."""
        return self.config.uses()

    def check(self, ctx: EvalContext) -> None:
        """No more clusters than samples."""
        check_clusters("fuzzy_clustering", self.config, ctx)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Cluster, and compare with the classes."""
        yield from measured("fuzzy_clustering", self.config, ctx, self.cluster)

    def cluster(self, given: Given) -> tuple[np.ndarray, Extra]:
        """The cluster of most membership, int64[N], and the partition coefficient."""
        config = self.config
        found = [
            fuzzy_c_means(given, config.fuzzifier, config.seed + start, config.iterations, config.tolerance)
            for start in range(config.starts)
        ]
        best = min(found, key=lambda one: one.objective)
        if best.partition < COLLAPSED:
            print(
                f"fuzzy_clustering: with fuzzifier = {config.fuzzifier:g} the {given.clusters} clusters have collapsed "
                f"(partition coefficient {best.partition:.3f}; 0: every sample belongs to all clusters alike); set "
                "a fuzzifier nearer to 1",
                file=sys.stderr,
            )
        return best.membership.argmax(axis=1), {"partition": (best.partition, True)}
