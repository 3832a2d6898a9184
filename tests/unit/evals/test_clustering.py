import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from pipeline.core.errors import ConfigError
from pipeline.evals._clusters import matched
from pipeline.evals.clustering import Clustering, Config
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity, make_streams


def measured(stream, **settings):
    return numbers(Clustering(Config(**settings)), context({"image": Identity()}, {"val": stream}))


def best_of_all_matchings(label, cluster):
    """Every one-to-one assignment of clusters to classes, tried."""
    classes, clusters = sorted(set(label)), sorted(set(cluster))
    size = max(len(classes), len(clusters))
    classes = classes + [-1] * (size - len(classes))
    best = 0
    for order in itertools.permutations(classes, len(clusters)):
        named = dict(zip(clusters, order, strict=True))
        best = max(best, sum(named[c] == t for c, t in zip(cluster, label, strict=True)))
    return best / len(label)


@pytest.mark.parametrize("clusters", [2, 4, 6])
def test_the_accuracy_is_that_of_the_best_matching(clusters):
    generator = np.random.default_rng(clusters)
    label, cluster = generator.integers(0, 4, 50), generator.integers(0, clusters, 50)
    assert matched(label, cluster).mean() == pytest.approx(best_of_all_matchings(label.tolist(), cluster.tolist()))


def test_which_samples_are_matched():
    """Class 5 is cluster 2 and class 7 is cluster 0; the rest are of no match."""
    label, cluster = np.array([5, 5, 7, 7, 7, 5]), np.array([2, 2, 0, 0, 2, 3])
    assert matched(label, cluster).tolist() == [True, True, True, True, False, False]


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def test_measures_from_the_table_of_counts(lone_group):
    stream = make_streams(samples=(10, 90))["val"]
    found = measured(stream, starts=3)
    unit = torch.nn.functional.normalize(stream.image).numpy()
    cluster = KMeans(6, n_init=3, random_state=0).fit_predict(unit)
    label = stream.label.numpy()
    table = np.array([[np.sum((label == i) & (cluster == j)) for j in range(6)] for i in range(6)])
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)
    shared = entropy(rows) + entropy(columns) - entropy(p.ravel())
    assert found["clustering/nmi"].value == pytest.approx(2 * shared / (entropy(rows) + entropy(columns)))
    pairs = sum(math.comb(int(v), 2) for v in table.ravel())
    a, b = (sum(math.comb(int(v), 2) for v in table.sum(axis)) for axis in (0, 1))
    expected = a * b / math.comb(90, 2)
    assert found["clustering/ari"].value == pytest.approx((pairs - expected) / ((a + b) / 2 - expected))
    accuracy = found["clustering/accuracy"]
    assert accuracy.value == pytest.approx(best_of_all_matchings(label.tolist(), cluster.tolist()))
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 90)) and accuracy.n == 90


def test_clusters_of_classes_far_apart_are_the_classes_whatever_their_length(lone_group):
    label = torch.arange(40) % 4
    x = torch.eye(4)[label] * torch.linspace(0.1, 9, 40)[:, None]
    found = measured(ListStream(x, label))
    assert [found[f"clustering/{name}"].value for name in ("nmi", "ari", "accuracy")] == [1.0, 1.0, 1.0]


def test_more_clusters_than_classes_do_not_help_accuracy(lone_group):
    label = torch.arange(40) % 2
    x = torch.nn.functional.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)))
    assert measured(ListStream(x, label), clusters=40)["clustering/accuracy"].value == pytest.approx(2 / 40)


def test_more_clusters_than_samples_are_refused(lone_group):
    with pytest.raises(ConfigError, match=r"clustering\.clusters: 50 clusters of 31 samples"):
        measured(make_streams()["val"], clusters=50)
