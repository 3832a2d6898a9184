import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from pipeline.core.evaluation import Number, Table
from pipeline.evals._classified import classified, guesses


def outputs(scores, label, classes):
    return {o.name: o for o in classified("x", guesses(scores), label, classes, "val", "_s")}


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 7, (90,), generator=generator)
    label[label == 5] = 2  # a class without samples
    scores = torch.randn(90, 7, generator=generator) + 1.5 * torch.nn.functional.one_hot(label, 7)
    return scores, label, tuple("abcdefg")


def test_equals_scikit_learn(scored):
    scores, label, classes = scored
    found, guess = outputs(scores, label, classes), scores.argmax(1)
    assert found["x/top1_s"].value == pytest.approx(accuracy_score(label, guess))
    five = top_k_accuracy_score(label, scores.numpy(), k=5, labels=range(7))
    assert found["x/top5_s"].value == pytest.approx(float(five)) and 0.5 < five < 1
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        recall = found["x/mean_per_class_recall_s"]
        assert recall.value == pytest.approx(balanced_accuracy_score(label, guess))
        assert recall.samples is not None and recall.samples.mean() == pytest.approx(recall.value)
        wrong = np.asarray(label) != np.asarray(guess)
        assert not recall.samples[wrong].any() and (recall.samples[~wrong] > 0).all()
    table = found["x/confusion_s"]
    assert isinstance(table, Table) and list(table.columns) == ["class", *classes]
    assert [row[1:] for row in table.rows] == confusion_matrix(label, guess, labels=range(7)).tolist()
    assert [row[0] for row in table.rows] == list(classes)


def test_samples_are_hits_in_the_order_of_the_labels(scored):
    scores, label, classes = scored
    number = outputs(scores, label, classes)["x/top1_s"]
    assert isinstance(number, Number) and number.samples is not None and number.samples.dtype == np.bool_
    assert number.samples.tolist() == [int(s.argmax()) == int(t) for s, t in zip(scores, label, strict=True)]
    assert number.stderr == pytest.approx(math.sqrt(number.value * (1 - number.value) / 90))


def test_the_error_of_the_mean_recall_is_what_a_simulation_finds():
    """Classes of 40, 10 and 5 samples, right with 0.9, 0.5 and 0.3: errors of each class add up as they are drawn."""
    generator = torch.Generator().manual_seed(0)
    counts, chance = (40, 10, 5), torch.tensor([0.9, 0.5, 0.3])
    label = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    values, errors = [], []
    for _ in range(2000):
        hit = torch.rand(55, generator=generator) < chance[label]
        number = outputs(torch.nn.functional.one_hot(torch.where(hit, label, (label + 1) % 3), 3).float(), label, "abc")
        values.append(number["x/mean_per_class_recall_s"].value)
        errors.append(number["x/mean_per_class_recall_s"].stderr)
    known = math.sqrt(sum(p * (1 - p) / n for p, n in zip(chance.tolist(), counts, strict=True))) / 3
    assert np.std(values) == pytest.approx(known, rel=0.05)
    # the plug-in variance of n trials is (n - 1) / n of what it should be, which is a fifth too little for five
    assert np.mean(np.square(errors)) == pytest.approx(known**2, rel=0.2)


def test_what_scores_minus_infinity_is_no_guess():
    scores = torch.tensor([[0.0, -math.inf, 1.0, -math.inf, -math.inf], [-math.inf] * 5])
    assert guesses(scores).tolist() == [[2, 0, -1, -1, -1], [-1] * 5]
    found = outputs(scores, torch.tensor([3, 0]), tuple("abcde"))
    assert found["x/top5_s"].value == 0 and found["x/mean_per_class_recall_s"].value == 0
    assert [sum(row[1:]) for row in found["x/confusion_s"].rows] == [0, 0, 0, 1, 0]


def test_many_classes_have_no_table_and_few_no_top5():
    names = tuple(map(str, range(51)))
    assert list(outputs(torch.eye(51), torch.arange(51), names)) == [
        "x/top1_s",
        "x/top5_s",
        "x/mean_per_class_recall_s",
    ]
    few = outputs(torch.eye(4), torch.arange(4), tuple("abcd"))
    assert list(few) == ["x/top1_s", "x/mean_per_class_recall_s", "x/confusion_s"]
