"""Self-training and label spreading on features: scikit-learn called by hand on the same draws."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

from pipeline.core.errors import ConfigError
from pipeline.evals.semi_supervised import Config, SemiSupervised
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


def rings(n, seed):
    """Two classes on two rings, which no straight line tells apart."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    angle = torch.rand(n, generator=generator) * 2 * torch.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * (1 - 0.6 * label[:, None])
    return ListStream(points + 0.03 * torch.randn(n, 2, generator=generator), label)


def measured(streams, **settings):
    return numbers(SemiSupervised(Config(**settings)), context({"image": Identity()}, streams))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:max_iter=300 was reached")
def test_equals_scikit_learn_on_the_same_draws(lone_group):
    streams = {"train": rings(120, 0), "val": rings(60, 1)}
    found = measured(streams, shots=(2, 6), draws=2, scale="none")
    evaluation = SemiSupervised(Config(shots=(2, 6), draws=2))
    x, truth = streams["train"].image.double().numpy(), streams["val"].label.numpy()
    for shots in (2, 6):
        right = {"logistic_regression": [], "self_training": [], "label_spreading": []}
        for draw in range(2):
            shown = evaluation.hidden(streams["train"].label, shots, draw).numpy()
            plain = LogisticRegression(max_iter=1000)
            fitted = {
                "logistic_regression": plain.fit(x[shown >= 0], shown[shown >= 0]),
                "self_training": SelfTrainingClassifier(LogisticRegression(max_iter=1000)).fit(x, shown),
                "label_spreading": LabelSpreading(kernel="knn", max_iter=300, tol=0.0).fit(x, shown),
            }
            for name, model in fitted.items():
                p = model.predict_proba(streams["val"].image.double().numpy())
                # Where no label has spread to, nothing is guessed.
                right[name].append((np.isfinite(p).all(axis=1) & (p.argmax(axis=1) == truth)).mean())
        for name, values in right.items():
            number = found[f"semi_supervised/{name}_{shots}shot"]
            assert number.value == pytest.approx(sum(values) / 2) and number.n == 60
            assert number.stderr == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-12)


def test_unlabelled_samples_show_where_the_rings_are(lone_group):
    found = measured({"train": rings(300, 0), "val": rings(100, 1)}, shots=(4,), draws=4)
    assert found["semi_supervised/label_spreading_4shot"].value > 0.9
    assert found["semi_supervised/logistic_regression_4shot"].value < 0.75


def test_so_many_labels_of_each_class_are_shown_and_more_hold_the_fewer():
    label, evaluation = torch.arange(40) % 4, SemiSupervised(Config())
    few, many = (evaluation.hidden(label, shots, 1) for shots in (2, 5))
    assert torch.bincount(few[few >= 0]).tolist() == [2] * 4 and torch.bincount(many[many >= 0]).tolist() == [5] * 4
    assert torch.equal(few[few >= 0], many[few >= 0])
    assert not torch.equal(few, evaluation.hidden(label, 2, 2))


def test_what_cannot_be(lone_group):
    streams = {"train": rings(24, 0), "val": rings(10, 1)}
    with pytest.raises(ConfigError, match="13 labels of each class asked for, but stream 'train' has only 12"):
        measured(streams, shots=(13,))
    with pytest.raises(ConfigError, match="neighbours = 24: stream 'train' has 24 samples"):
        measured(streams, shots=(1,), neighbours=24)
    with pytest.raises(ValidationError):
        Config(threshold=1.0)
