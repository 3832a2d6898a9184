import math

import numpy as np
import pytest
import scipy.optimize
import torch

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features
from pipeline.evals.linear_probe import Config, LinearProbe
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity

NAMES = tuple("abcdefgh")


def features(samples, classes=5, seed=0, dim=6, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    label = torch.arange(samples) % classes
    x = centre[label] + noise * torch.randn(samples, dim, generator=generator)
    # standardising must undo this
    return Features(
        (x * torch.logspace(-3, 3, dim) + torch.linspace(-50, 50, dim)).float(), {"label": label}, NAMES[:classes]
    )


def relabelled(features, label):
    return features._replace(fields={"label": label})


def reference(train, test, l2):
    """Multinomial logistic regression on standardised features, in float64, by another optimizer."""
    x, y, k = train.x.double().numpy(), train.label.numpy(), len(train.classes)
    mean, std = x.mean(0), np.sqrt(x.var(0) + 1e-6)
    x, t = (x - mean) / std, (test.x.double().numpy() - mean) / std

    def cost(flat):
        w, b = flat[: k * x.shape[1]].reshape(k, -1), flat[k * x.shape[1] :]
        z = x @ w.T + b
        z -= z.max(1, keepdims=True)
        p = np.exp(z)
        p /= p.sum(1, keepdims=True)
        value = -np.log(p[np.arange(len(y)), y]).mean() + l2 / 2 * (w**2).sum()
        p[np.arange(len(y)), y] -= 1
        return value, np.concatenate([(p.T @ x / len(y) + l2 * w).ravel(), p.mean(0)])

    best = scipy.optimize.minimize(
        cost, np.zeros(k * (x.shape[1] + 1)), jac=True, method="BFGS", options={"gtol": 1e-7}
    )
    w, b = best.x[: k * x.shape[1]].reshape(k, -1), best.x[k * x.shape[1] :]
    return ((t @ w.T + b).argmax(1) == test.label.numpy()).mean()


def probe(train, test, **settings):
    return {r.name: r for r in LinearProbe(Config(**settings)).probe(train, test)}


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_accuracy_equals_a_float64_reference(l2):
    train, test = features(400), features(500, seed=1)
    result = probe(train, test, l2=(l2,))["linear_probe/top1"]
    assert result.value == pytest.approx(reference(train, test, l2), abs=0.005)
    assert result.n == 500 and result.split == "val"
    assert result.stderr == pytest.approx(math.sqrt(result.value * (1 - result.value) / 500))


def test_the_strength_is_chosen_on_training_samples_alone():
    train, test = features(300, noise=3.0), features(100, seed=1)
    first = probe(train, test)
    garbled = probe(train, relabelled(test, test.label.flip(0))._replace(x=test.x.flip(0)))
    assert first["linear_probe/l2"] == garbled["linear_probe/l2"]
    assert first["linear_probe/l2"].value in Config().l2 and first["linear_probe/l2"].split == "train"


def test_noise_wants_a_stronger_prior_than_clean_data():
    """Few samples in many dimensions: with half the labels wrong, the weights must be held back."""
    clean = features(200, dim=64, noise=0.1)
    noisy = features(200, dim=64, noise=0.1)
    wrong = torch.rand(200, generator=torch.manual_seed(0)) < 0.6
    noisy = relabelled(noisy, torch.where(wrong, noisy.label[torch.randperm(200)], noisy.label))
    test = features(100, dim=64, seed=1, noise=0.1)
    assert probe(clean, test)["linear_probe/top1"].value == 1.0
    assert probe(noisy, test)["linear_probe/l2"].value >= 1e-2


def test_a_choice_at_the_edge_of_the_grid_is_flagged():
    train, test = features(300, noise=2.0), features(100, seed=1)
    assert probe(train, test, l2=(1e-6, 1e3))["linear_probe/l2_at_edge"].value == 1
    assert probe(train, test, l2=(1e3, 1e-3, 1e-20))["linear_probe/l2_at_edge"].value == 0
    assert probe(train, test, l2=(1e-3,))["linear_probe/l2_at_edge"].value == 0


def test_running_out_of_iterations_is_reported():
    train, test = features(300), features(100, seed=1)
    assert probe(train, test, l2=(1e-6,), max_iterations=2)["linear_probe/converged"].value == 0
    assert probe(train, test, l2=(1e-2,))["linear_probe/converged"].value == 1


def test_a_class_that_training_lacks_is_never_predicted_and_two_classes_work():
    train, test = features(100, classes=4), features(80, classes=4, seed=1)
    lacking = relabelled(train, torch.where(train.label == 2, 3, train.label))
    assert probe(lacking, test)["linear_probe/top1"].value <= 0.75
    two = {name: relabelled(part, part.label % 2 * 3) for name, part in (("train", train), ("test", test))}
    assert probe(two["train"], two["test"])["linear_probe/top1"].value > 0.4
    assert "linear_probe/top5" not in probe(train, test) and "linear_probe/top5" in probe(features(100), features(50))


def test_too_little_to_fit_is_a_data_error(lone_group):
    x, one = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    for streams in (
        {"train": ListStream(x, one), "val": ListStream(x, one)},
        {"train": ListStream(x[:9], one[:9]), "val": ListStream(x, one)},
    ):
        with pytest.raises(DataError, match="needs two classes and 20 samples"):
            numbers(LinearProbe(Config()), context({"image": Identity()}, streams))
