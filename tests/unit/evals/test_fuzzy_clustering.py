"""Fuzzy c-means against its equations, number by number, and where it collapses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import kmeans_plusplus
from torch.nn import functional

from pipeline.evals._clusters import Given
from pipeline.evals._fuzzy import fuzzy_c_means
from pipeline.evals.fuzzy_clustering import Config, FuzzyClustering
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.clusterings import finds_classes_far_apart, points, refuses_more_clusters_than_samples
from tests.unit.evals.test_knn import Identity


def plain_c_means(x: np.ndarray, centres: np.ndarray, m: float, iterations: int) -> np.ndarray:
    """Bezdek's two equations, number by number."""
    u = np.zeros((len(x), len(centres)))
    for _ in range(iterations):
        d = np.array([[max(((a - c) ** 2).sum(), 1e-12) for c in centres] for a in x])  # it starts on samples
        for i, k in itertools.product(range(len(x)), range(len(centres))):
            u[i, k] = 1 / sum((d[i, k] / d[i, j]) ** (1 / (m - 1)) for j in range(len(centres)))
        centres = np.array([(u[:, k, None] ** m * x).sum(0) / (u[:, k] ** m).sum() for k in range(len(centres))])
    return u


@pytest.mark.parametrize("m", [1.1, 2.0])
def test_memberships_are_bezdeks(m):
    x = points()
    start, _ = kmeans_plusplus(x.astype(np.float64), 4, random_state=3)
    found = fuzzy_c_means(Given(x, 4), m, 3, 7, 0.0)
    expected = plain_c_means(x.astype(np.float64), start, m, 7)
    np.testing.assert_allclose(found.membership, expected, atol=1e-8)
    assert found.partition == pytest.approx(((expected**2).sum(1).mean() - 0.25) / 0.75)


def test_with_a_fuzzifier_of_three_in_many_dimensions_it_collapses_and_says_so(lone_group, capsys):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 4
    x = functional.normalize(torch.eye(4, 200)[label] + 0.1 * torch.randn(60, 200, generator=generator))
    streams = {"val": ListStream(x, label)}

    def measured(fuzzifier: float) -> dict[str, float]:
        found = numbers(FuzzyClustering(Config(fuzzifier=fuzzifier)), context({"image": Identity()}, streams))
        return {name.rpartition("/")[2]: number.value for name, number in found.items()}

    assert measured(1.1)["nmi"] == 1 and measured(1.1)["partition"] > 0.9 and not capsys.readouterr().err
    assert measured(3.0)["partition"] < 0.05
    assert "fuzzifier = 3 the 4 clusters have collapsed" in capsys.readouterr().err


def test_clusters_of_classes_far_apart_are_the_classes(lone_group):
    finds_classes_far_apart(FuzzyClustering(Config()), "fuzzy_clustering")


def test_more_clusters_than_samples_are_refused(lone_group):
    refuses_more_clusters_than_samples(FuzzyClustering(Config(clusters=50)), "fuzzy_clustering")
