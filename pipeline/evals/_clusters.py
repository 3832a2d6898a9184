"""Clusterings of frozen features, and how they agree with classes. Shape letters: N samples, D width, K clusters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number, Uses
from pipeline.dist.group import from_first


class ClusterConfig(Strict):
    """What every clustering of features has."""

    test: str = "val"
    """Stream whose samples are clustered."""
    clusters: Annotated[int, Field(ge=2)] | None = None
    """Left out: as many as classes occur."""
    seed: int = 0

    def uses(self) -> Uses:
        """The stream that is clustered; its labels are looked at afterwards."""
        return Uses({self.test: ("image", "label")})


class Given(NamedTuple):
    """What is clustered."""

    x: np.ndarray
    """float32[N,D], unit vectors."""
    clusters: int


Extra = dict[str, tuple[float, bool]]
"""Further numbers by name, and whether more of them is better."""


def check_clusters(name: str, config: ClusterConfig, ctx: EvalContext) -> None:
    """No more clusters than samples.

    Raises:
        ConfigError: there are.
    """
    samples = ctx.streams[config.test].samples
    if config.clusters is not None and config.clusters > samples:
        raise ConfigError(
            f"{name}.clusters: {config.clusters} clusters of {samples} samples (stream {config.test!r}); set fewer"
        )


def measured(
    name: str, config: ClusterConfig, ctx: EvalContext, cluster: Callable[[Given], tuple[np.ndarray, Extra]]
) -> Iterator[Number]:
    """Extract on all ranks, cluster on the first, tell all.

    Args:
        name: of the evaluation.
        config: its settings.
        ctx: of the suite.
        cluster: gives int64[N], and further numbers.
    """
    found = ctx.features("image", config.test)
    x, label = functional.normalize(found.x).numpy(), found.label.numpy()

    def first() -> list[Number]:
        own, extra = cluster(Given(x, config.clusters or max(2, len(np.unique(label)))))
        more = [
            Number(f"{name}/{key}", value, len(label), config.test, better="higher" if good else "lower")
            for key, (value, good) in extra.items()
        ]
        return [*agreement(name, label, own, config.test), *more]

    yield from from_first(first() if ctx.place.first else [])


def agreement(name: str, label: np.ndarray, cluster: np.ndarray, split: str) -> list[Number]:
    """NMI, ARI and matched accuracy of clusters int64[N] with classes int64[N]."""
    right, n = matched(label, cluster), len(label)
    accuracy = float(right.mean())
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    return [
        Number(f"{name}/nmi", float(normalized_mutual_info_score(label, cluster)), n, split),
        Number(f"{name}/ari", float(adjusted_rand_score(label, cluster)), n, split),
        Number(f"{name}/accuracy", accuracy, n, split, error, samples=right),
    ]


def matched(label: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Whether each sample's cluster is matched with its class, under the one-to-one matching that is best: bool[N]."""
    table = contingency_matrix(label, cluster)
    pairs = set(zip(*linear_sum_assignment(table, maximize=True), strict=True))
    _, place = np.unique(label, return_inverse=True)
    _, group = np.unique(cluster, return_inverse=True)
    return np.array([pair in pairs for pair in zip(place, group, strict=True)])
