import math

import pytest
import torch

from pipeline.core.errors import DataError
from pipeline.evals.accuracy import Accuracy, Config
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


def run(logits, label, classes=None, known=None):
    stream = ListStream(torch.tensor(logits), torch.tensor(label))
    stream.classes = classes or stream.classes
    return numbers(Accuracy(Config()), context({"logits": Identity()}, {"val": stream}, classes=known))


def test_hits_counted_by_hand(lone_group):
    logits = [[5.0, 4, 3, 2, 1, 0], [0.0, 5, 4, 3, 2, 1], [1.0, 0, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]]
    results = run(logits, [0, 1, 2, 0], classes=tuple("abcdef"))  # right; right; fourth; last
    assert results["accuracy/top1"].value == 0.5 and results["accuracy/top5"].value == 0.75
    assert results["accuracy/top1"].stderr == math.sqrt(0.25 / 4) and results["accuracy/top1"].n == 4


def test_few_classes_have_no_top5(lone_group):
    found = run([[0.0, 1.0], [1.0, 0.0]], [1, 1])
    assert list(found) == ["accuracy/top1", "accuracy/mean_per_class_recall"]


PETS = ("cat", "dog", "eel")


def test_classes_are_the_same_by_name(lone_group):
    """Trained on cat, dog and eel, measured on eel and dog: the second logit is the dog's whatever its label is."""
    logits = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    found = run(logits, [1, 0, 1], classes=("eel", "dog"), known=PETS)
    assert found["accuracy/top1"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [("dog", "eel", "fox"), ("dog", "eel", "fox", "gnu")])
def test_a_class_that_was_not_trained_on_is_named(lone_group, classes):
    with pytest.raises(
        DataError,
        match=r"'val' has samples of class 'fox', which the classifier does not know; "
        r"the classifier knows class 'cat' instead",
    ):
        run([[0.0, 1.0, 0.0]] * 3, [0, 1, 2], classes=classes, known=PETS)


def test_a_class_of_the_list_without_samples_matters_to_nobody(lone_group):
    found = run([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0, 1], classes=("dog", "eel", "fox"), known=PETS)
    assert found["accuracy/top1"].value == 1.0


def test_names_that_stand_for_two_classes_cannot_be_matched(lone_group):
    logits = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(DataError, match="'crane' is the name of two"):
        run(logits, [0, 1], classes=("crane", "dog"), known=("dog", "crane", "crane"))
    same = ("crane", "dog", "crane")
    assert run([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [0, 2], classes=same, known=same)["accuracy/top1"].value == 1.0


def test_two_ways_to_write_an_accent_are_one_class(lone_group):
    """As sets of earlier versions hold them: composed in one, with a combining accent in the other."""
    found = run([[1.0, 0.0], [0.0, 1.0]], [1, 0], classes=("dog", "cafe\u0301"), known=("caf\u00e9", "dog"))
    assert found["accuracy/top1"].value == 1.0
