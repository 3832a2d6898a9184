"""The closed-form classifier against solving its equations at once, and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features
from pipeline.evals._head import HeadConfig, fitted, head_of
from tests.contracts.components import ListStream, context
from tests.unit.evals.test_knn import Identity


def features(n: int = 90, classes: int = 4, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, classes, (n,), generator=generator)
    x = 3 * torch.randn(classes, 7, generator=generator)[label] + noise * torch.randn(n, 7, generator=generator) + 5
    return Features(x, {"label": label}, tuple("abcd"))


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_equals_ridge_regression_of_scikit_learn(l2):
    known = features()
    x, y = known.x.double().numpy(), np.eye(4)[known.label.numpy()]
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    theirs = Ridge(alpha=l2 * len(z)).fit(z, y)
    weight, bias = fitted(known, (l2,))
    found = known.x.double() @ weight.double() + bias.double()
    np.testing.assert_allclose(found.numpy(), theirs.predict(z), rtol=0, atol=2e-6)


def test_the_strength_is_the_one_that_does_best_on_samples_that_were_not_fitted():
    """With noise beside a few features, the weakest fits what it has seen and the middle one what it has not."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 2
    x = torch.randn(60, 58, generator=generator)
    x[:, 0] += 2.5 * label
    known, strengths = Features(x, {"label": label}, ("a", "b")), (1e-9, 0.3, 1e6)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    held, rest = order[:6], order[6:]
    z = ((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-6)).double().numpy()
    hits = []
    for l2 in strengths:
        model = Ridge(alpha=l2 * len(rest)).fit(z[rest], np.eye(2)[label[rest].numpy()])
        hits.append(int((model.predict(z[held]).argmax(1) == label[held].numpy()).sum()))
    best = max(range(3), key=lambda i: (hits[i], strengths[i]))
    weight, bias = fitted(known, strengths)
    expected = fitted(known, (strengths[best],))
    assert torch.equal(weight, expected[0]) and torch.equal(bias, expected[1]) and len(set(hits)) > 1


def test_a_class_that_was_never_seen_is_never_guessed():
    known = features()
    known.label[known.label == 2] = 3
    weight, bias = fitted(known, (1e-2,))
    scores = known.x @ weight + bias
    assert bool((scores[:, 2] == -torch.inf).all()) and bool(scores[:, [0, 1, 3]].isfinite().all())


def test_too_little_to_learn_from_is_named(lone_group):
    stream = ListStream(torch.randn(30, 5), torch.zeros(30, dtype=torch.int64))
    with torch.no_grad(), pytest.raises(DataError, match="stream 'train' has 30 samples of 1 classes"):
        head_of(context({"image": Identity()}, {"train": stream}), HeadConfig())
