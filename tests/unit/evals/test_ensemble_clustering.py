"""Ensembles of clusterings: co-association by hand, and many wrong members that are right together."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.errors import ConfigError
from pipeline.evals import ensemble_clustering
from pipeline.evals.ensemble_clustering import Config, EnsembleClustering, co_association, consensus
from tests.contracts.components import context, numbers
from tests.unit.evals.clusterings import finds_classes_far_apart, refuses_more_clusters_than_samples
from tests.unit.evals.test_knn import Identity, make_streams


def test_an_ensemble_of_too_many_samples_is_refused(lone_group, monkeypatch):
    monkeypatch.setattr(ensemble_clustering, "MOST", 30)
    with pytest.raises(ConfigError, match=r"ensemble_clustering\.test: 31 samples .* the most is 30"):
        numbers(EnsembleClustering(Config()), context({"image": Identity()}, make_streams()))


def test_co_association_counts_the_clusterings_that_put_a_pair_together():
    labels = np.array([[0, 0, 1, 1], [5, 5, 5, 6], [1, 2, 3, 3]])
    third = 1 / 3
    expected = [[1, 2 * third, third, 0], [2 * third, 1, third, 0], [third, third, 1, 2 * third], [0, 0, 2 * third, 1]]
    np.testing.assert_allclose(co_association(labels), expected, rtol=1e-6)
    assert consensus(co_association(labels), 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_the_ensemble_outvotes_members_that_are_wrong():
    """Each of fifteen clusterings has a quarter of its samples at chance; together they are right."""
    generator = np.random.default_rng(0)
    truth = np.arange(60) % 3
    labels = np.stack([np.where(generator.random(60) < 0.25, generator.integers(0, 3, 60), truth) for _ in range(15)])
    found = consensus(co_association(labels), 3)
    assert all(len(np.unique(found[truth == k])) == 1 for k in range(3)) and len(np.unique(found)) == 3
    assert all((own != truth).any() for own in labels)


def test_clusters_of_classes_far_apart_are_the_classes(lone_group):
    finds_classes_far_apart(EnsembleClustering(Config(steps=200, members=2)), "ensemble_clustering")


def test_more_clusters_than_samples_are_refused(lone_group):
    refuses_more_clusters_than_samples(EnsembleClustering(Config(clusters=50)), "ensemble_clustering")
