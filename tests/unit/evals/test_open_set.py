"""Known and unknown classes."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import recall_score

from pipeline.core.errors import DataError
from pipeline.evals.open_set import Config, OpenSet, decided, in_larger_cluster, recalls_of
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity

KNOWN = ("a", "b", "c")


def stream(logits, label, classes):
    made = ListStream(logits, label)
    made.classes, made.fingerprint = classes, "test"
    return made


def measured(logits, label, classes=("c", "x", "a", "y", "b"), **settings):
    ctx = context({"logits": Identity()}, {"test": stream(logits, label, classes)}, KNOWN)
    return {name: number.value for name, number in numbers(OpenSet(Config(**settings)), ctx).items()}


@pytest.mark.usefixtures("lone_group")
def test_classes_are_known_by_their_names_and_all_others_are_one():
    sure = 9 * torch.eye(3)
    unsure = torch.zeros(3)
    # c right, c wrong, x found, x missed, a right, y found, b right, b taken for unknown
    logits = torch.stack([sure[2], sure[0], unsure, sure[1], sure[0], unsure, sure[1], unsure])
    label = torch.tensor([0, 0, 1, 1, 2, 3, 4, 4])
    for settings in ({}, {"confidence": 0.9}):
        found = measured(logits, label, **settings)
        known, unknown = (0.5 + 1 + 0.5) / 3, 2 / 3
        assert found["open_set/known"] == pytest.approx(known)
        assert found["open_set/unknown"] == pytest.approx(unknown)
        assert found["open_set/hos"] == pytest.approx(2 / (1 / known + 1 / unknown))


def test_recalls_are_scikit_learns_and_hos_is_nought_where_both_are():
    generator = torch.Generator().manual_seed(0)
    guess, label = torch.randint(0, 4, (2, 200), generator=generator)
    found = recalls_of(guess, label, KNOWN)
    each = recall_score(label, guess, average=None)
    assert found.known == pytest.approx(each[:3].mean()) and found.unknown == pytest.approx(each[3])
    assert recalls_of((label + 1) % 4, label, KNOWN).hos == 0.0
    one = recalls_of(torch.tensor([0, 3]), torch.tensor([0, 3]), KNOWN)
    assert [row[0] for row in one.by_class] == ["a", "unknown"] and one.hos == 1.0


def test_two_clusters_are_those_of_k_means():
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(40, generator=generator) * 0.3, 2 + torch.randn(25, generator=generator) * 0.4])
    start = torch.stack([values.min(), values.max()])[:, None].numpy()
    theirs = KMeans(2, init=start, n_init=1).fit(values[:, None].numpy()).labels_
    assert in_larger_cluster(values.double()).tolist() == (theirs == 1).tolist()
    assert not in_larger_cluster(torch.ones(4)).any()
    assert in_larger_cluster(torch.tensor([0.0, 1.0])).tolist() == [False, True]


def test_the_unsure_are_unknown_whatever_the_order_of_classes():
    logits = torch.tensor([[9.0, 0, 0], [1.0, 1.1, 1.0], [0, 8.0, 0]])
    for order in itertools.permutations(range(3)):
        found = decided(logits[:, list(order)], None)
        assert found.tolist() == [order.index(0), 3, order.index(1)]


@pytest.mark.usefixtures("lone_group")
def test_a_stream_without_either_kind_is_refused():
    logits = torch.eye(3)
    with pytest.raises(DataError, match="no unknown class; 'open_set' needs both"):
        measured(logits, torch.tensor([0, 1, 2]), KNOWN)
    with pytest.raises(DataError, match="no class that the classifier knows"):
        measured(logits, torch.tensor([0, 1, 2]), ("x", "y", "z"))
