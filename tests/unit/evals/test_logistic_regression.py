import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression as Peer
from sklearn.preprocessing import StandardScaler, normalize

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features, Number
from pipeline.evals._logistic import STRENGTHS, Regression, axes, fit
from pipeline.evals.logistic_regression import Config, LogisticRegression
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity, make_streams

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


def outputs(train, test, **settings):
    regression = Regression(Config(**settings), "logistic_regression", torch.device("cpu"))
    return {o.name.removeprefix("logistic_regression/"): o for o in regression.measured(train, test)}


def peer(x, label, c, tolerance=1e-10):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Peer(C=c, tol=tolerance, max_iter=10_000).fit(x, label)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_accuracy_equals_a_float64_reference(l2):
    train, test = features(400), features(500, seed=1)
    result = outputs(train, test, l2=(l2,))["top1"]
    assert result.value == pytest.approx(reference(train, test, l2), abs=1e-9)
    assert result.n == 500 and result.split == "val"
    assert result.stderr == pytest.approx(math.sqrt(result.value * (1 - result.value) / 500))


@pytest.mark.parametrize("c", [1e-5, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_weights_equal_those_of_scikit_learn(c, precision):
    train = features(400, noise=2.0)
    x = torch.from_numpy(StandardScaler().fit_transform(train.x.double().numpy()))
    known = axes(x.to(torch.float64 if precision == "fp64" else torch.float32))
    tolerance, near = (1e-9, 1e-4) if precision == "fp64" else (1e-4, 1e-2)
    found = fit(known, train.label, 5, c, tolerance, 1000, None)
    theirs = peer(x.numpy(), train.label.numpy(), c)
    ours = torch.cat([found.weight, (found.bias - found.bias.mean())[:, None]], dim=1).double()
    expected = np.concatenate([theirs.coef_, (theirs.intercept_ - theirs.intercept_.mean())[:, None]], axis=1)
    np.testing.assert_allclose(ours.numpy(), expected, atol=near * abs(expected).max() + 1e-6)
    assert found.converged


def test_two_classes_are_two_rows_of_weights_and_half_as_strong():
    """scikit-learn has one row w for two classes, w = 2 w_1 here: |w|^2 / 2 is twice |w_1|^2 / 2 + |w_2|^2 / 2."""
    train = features(300, classes=2, noise=2.0)
    x = StandardScaler().fit_transform(train.x.double().numpy())
    found = fit(axes(torch.from_numpy(x)), train.label, 2, 0.05, 1e-8, 1000, None)
    np.testing.assert_allclose(
        (found.weight[1] - found.weight[0]).numpy(), peer(x, train.label, 0.1).coef_[0], rtol=1e-4
    )


@pytest.mark.parametrize("scale", ["standardise", "normalise", "none"])
def test_the_strength_is_the_one_that_scikit_learn_finds_best_on_the_held_out_part(scale):
    train, test = features(300, noise=3.0), features(100, seed=1, noise=3.0)
    train, test = (
        part._replace(x=(part.x - torch.linspace(-50, 50, 6)) / torch.logspace(-3, 3, 6)) for part in (train, test)
    )
    strengths = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    found = outputs(train, test, c=strengths, scale=scale, tolerance=1e-7)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    held, rest = order[:30], order[30:]

    def prepared(known, other):
        known, other = known.double().numpy(), other.double().numpy()
        if scale == "standardise":
            fitted = StandardScaler().fit(known)
            return fitted.transform(known), fitted.transform(other)
        return (normalize(known), normalize(other)) if scale == "normalise" else (known, other)

    x, held_x = prepared(train.x[rest], train.x[held])
    reached = [peer(x, train.label[rest].numpy(), c).score(held_x, train.label[held].numpy()) for c in strengths]
    assert [row[1] for row in found["strengths"].rows] == pytest.approx(reached)
    assert len(set(reached)) > 1 and found["c"].value == strengths[int(np.argmax(reached))]
    x, test_x = prepared(train.x, test.x)
    best = peer(x, train.label.numpy(), found["c"].value)
    assert found["top1"].value == pytest.approx(best.score(test_x, test.label.numpy()))
    assert found["top1"].samples.tolist() == (best.predict(test_x) == test.label.numpy()).tolist()


def test_the_strengths_are_those_of_dinov2():
    np.testing.assert_allclose(STRENGTHS, 10.0 ** np.linspace(-6, 5, 45), rtol=1e-12)
    assert Config().strengths(100) == list(STRENGTHS)
    assert Config(l2=(1e-3, 1e-1)).strengths(200) == pytest.approx([0.05, 5.0])
    with pytest.raises(ValidationError, match="'c' and 'l2' say the same thing"):
        Config(c=(1.0,), l2=(1.0,))


def test_the_strength_is_chosen_on_training_samples_alone():
    train, test = features(300, noise=3.0), features(100, seed=1)
    first = outputs(train, test)
    garbled = outputs(train, relabelled(test, test.label.flip(0))._replace(x=test.x.flip(0)))
    assert first["c"] == garbled["c"] and first["strengths"] == garbled["strengths"]
    assert first["c"].value in STRENGTHS and first["c"].split == "train"


def test_noise_wants_a_stronger_prior_than_clean_data():
    """Few samples in many dimensions: with half the labels wrong, the weights must be held back."""
    clean = features(200, dim=64, noise=0.1)
    noisy = features(200, dim=64, noise=0.1)
    wrong = torch.rand(200, generator=torch.manual_seed(0)) < 0.6
    noisy = relabelled(noisy, torch.where(wrong, noisy.label[torch.randperm(200)], noisy.label))
    test = features(100, dim=64, seed=1, noise=0.1)
    assert outputs(clean, test)["top1"].value == 1.0
    assert outputs(noisy, test)["c"].value <= 1 / (1e-2 * 200)


def test_a_choice_at_the_edge_of_the_grid_is_flagged():
    train, test = features(300, noise=2.0), features(100, seed=1)
    assert outputs(train, test, l2=(1e-6, 1e3))["c_at_edge"].value == 1
    assert outputs(train, test, l2=(1e3, 1e-3, 1e-20))["c_at_edge"].value == 0
    assert outputs(train, test, l2=(1e-3,))["c_at_edge"].value == 0


def test_running_out_of_iterations_is_reported():
    train, test = features(300), features(100, seed=1)
    short = outputs(train, test, l2=(1e-5, 1e-6), max_iterations=2, tolerance=1e-6)
    assert short["converged"].value == 0 and [row[2:] for row in short["strengths"].rows] == [[2, 0], [2, 0]]
    assert outputs(train, test, l2=(1e-2,))["converged"].value == 1


def test_a_warm_start_ends_where_a_cold_one_does_and_sooner():
    train = features(400, noise=2.0)
    known = axes(torch.from_numpy(StandardScaler().fit_transform(train.x.double().numpy())))
    stronger = fit(known, train.label, 5, 1.0, 1e-7, 1000, None)
    cold = fit(known, train.label, 5, 2.0, 1e-7, 1000, None)
    warm = fit(known, train.label, 5, 2.0, 1e-7, 1000, stronger)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=1e-4, atol=1e-5)
    assert warm.iterations < cold.iterations


def test_ill_conditioned_features_take_few_steps_to_a_millionth_of_the_least_loss():
    """Variances from 1 to 1e-5 along the axes, as features of networks have them: scikit-learn takes 133 steps."""
    generator = torch.Generator().manual_seed(0)
    turn, centre, noise = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (40, 6, 600))
    label = torch.arange(600) % 6
    x = (0.7 * centre[label] + noise) * torch.logspace(0, -2.5, 40) @ torch.linalg.qr(turn)[0]
    found, theirs = fit(axes(x), label, 6, 10.0, 1e-4, 1000, None), peer(x.numpy(), label.numpy(), 10.0, 1e-8)

    def loss(weight, bias):
        mean = torch.nn.functional.cross_entropy(x @ torch.as_tensor(weight).T + torch.as_tensor(bias), label)
        return float(mean) + float((torch.as_tensor(weight) ** 2).sum()) / (2 * 10 * 600)

    assert loss(found.weight, found.bias) - loss(theirs.coef_, theirs.intercept_) < 2e-6
    assert found.converged and found.iterations < theirs.n_iter_[0] / 3


def test_two_of_eight_names_and_few_classes_work():
    train, test = features(100, classes=4), features(80, classes=4, seed=1)
    train, test = (relabelled(part, part.label % 2 * 3)._replace(classes=NAMES) for part in (train, test))
    found = outputs(train, test)
    assert found["top1"].value > 0.4 and {*found["top1"].samples.tolist()} == {True, False}
    assert "top5" in found and "top5" not in outputs(features(100, classes=4), features(50, classes=4))


def refused(streams):
    with pytest.raises(DataError) as caught:
        numbers(LogisticRegression(Config()), context({"image": Identity()}, streams))
    return str(caught.value)


def test_too_little_to_fit_is_a_data_error(lone_group):
    x, one = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    two = torch.arange(30) % 2
    assert "30 samples of 1 classes" in refused({"train": ListStream(x, one), "val": ListStream(x, one)})
    few = refused({"train": ListStream(x[:9], two[:9]), "val": ListStream(x, two)})
    assert "9 samples of 2 classes; a probe needs two classes and 20 samples" in few


def test_a_class_missing_from_training_is_named(lone_group):
    streams = make_streams()
    streams["train"].label[streams["train"].label == 2] = 3
    streams["val"].label[0] = 2
    assert "'val' has samples of class 'class 2', of which stream 'train' has none" in refused(streams)
    streams = make_streams()
    streams["val"].classes = (*streams["val"].classes[:-1], "gnu")
    assert "'gnu', which stream 'train' does not know" in refused(streams)


def test_features_that_are_not_finite_are_counted(lone_group):
    streams = make_streams()
    streams["train"].image[3, 0] = math.nan
    assert "the features of 1 of 57 samples of stream 'train' are not finite" in refused(streams)


def test_all_is_measured_from_streams(lone_group):
    streams = make_streams()
    found = numbers(LogisticRegression(Config(c=(0.01, 0.1, 1.0))), context({"image": Identity()}, streams))
    assert all(isinstance(number, Number) for number in found.values())
    x = StandardScaler().fit(streams["train"].image.double().numpy())
    theirs = peer(x.transform(streams["train"].image), streams["train"].label, found["logistic_regression/c"].value)
    score = theirs.score(x.transform(streams["val"].image), streams["val"].label)
    assert found["logistic_regression/top1"].value == pytest.approx(score)
