"""Scores that choose without labels: against transcriptions, and blind to the target's labels."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import entropy, norm
from torch import nn

from pipeline.core.errors import DataError
from pipeline.evals.selection import Config, Selection, density_ratio
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


def made(n, seed, shift=0.0, flip=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n,), generator=generator)
    logits = torch.randn(n, 4, generator=generator) + shift * torch.tensor([1.0, 0.5, 0.0, 0.0])
    logits[torch.arange(n), label] += 1.5
    stream = ListStream(logits, (label + flip) % 4)
    stream.classes = tuple("abcd")
    return stream


def streams(flip=0):
    return {"train": made(80, 0), "source": made(60, 1), "target": made(70, 2, 0.8, flip)}


def measured(given, **settings):
    encoders: dict[str, nn.Module] = {"logits": Identity(), "image": Identity()}
    return numbers(Selection(Config(**settings)), context(encoders, given))


def test_scores_are_those_of_a_plain_computation(lone_group):
    given = streams()
    found = {name: number.value for name, number in measured(given).items()}
    source, target = given["source"].image.double().numpy(), given["target"].image.double().numpy()
    right = source.argmax(axis=1) == given["source"].label.numpy()
    assert found["selection/source_accuracy"] == pytest.approx(right.mean())
    p = softmax(target, axis=1)
    assert found["selection/entropy"] == pytest.approx(entropy(p, axis=1).mean(), rel=1e-6)
    assert found["selection/bnm"] == pytest.approx(np.linalg.norm(p, "nuc") / np.sqrt(70 * 4), rel=1e-6)
    unit = p / np.linalg.norm(p, axis=1, keepdims=True)
    rows = [np.delete(unit @ unit[i], i) / 0.05 for i in range(70)]
    assert found["selection/snd"] == pytest.approx(np.mean([entropy(softmax(row)) for row in rows]), rel=1e-6)
    weight = plain_weights(*(given[name].image.double().numpy() for name in ("train", "source", "target")))
    assert found["selection/importance_weighted"] == pytest.approx(np.average(right, weights=weight), rel=1e-4)
    assert found["selection/effective_samples"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum() / 60, rel=1e-3)


def plain_weights(train, source, target):
    """N_s / N_t * J(target | x) / J(source | x), as You et al. have it (ICML 2019, "Towards Accurate Model Selection in
    Deep Unsupervised Domain Adaptation", section 4.1). J is a logistic regression of the domains, fitted here by a
    general minimiser: features standardised, squared weights as penalty, the intercept free.
    """

    both = np.concatenate([train, target])
    mean, scale = both.mean(axis=0), both.std(axis=0)
    x, side = (both - mean) / scale, np.r_[-np.ones(len(train)), np.ones(len(target))]

    def objective(w):
        return np.logaddexp(0, -side * (x @ w[:-1] + w[-1])).sum() + w[:-1] @ w[:-1] / 2

    w = minimize(objective, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-6}).x
    p = expit((source - mean) / scale @ w[:-1] + w[-1])
    return len(train) / len(target) * p / (1 - p)


def test_weighting_tells_the_accuracy_on_a_shifted_domain(lone_group):
    """x is N(0, 1) in the source and N(1, 1) in the target, and answers are wrong four times as often below 0."""
    generator = torch.Generator().manual_seed(5)

    def shifted(n, mean):
        x = mean + torch.randn(n, generator=generator)
        wrong = torch.rand(n, generator=generator) < torch.where(x < 0, 0.4, 0.1)
        stream = ListStream(torch.stack([x, torch.zeros(n)], 1), ((x < 0) ^ wrong).long())
        stream.classes = ("above", "below")
        return stream

    found = measured({name: shifted(2000, mean) for name, mean in (("train", 0.0), ("source", 0.0), ("target", 1.0))})
    of_target = 0.9 - 0.3 * norm.cdf(-1)
    assert found["selection/source_accuracy"].value == pytest.approx(0.75, abs=0.02)
    assert found["selection/importance_weighted"].value == pytest.approx(of_target, abs=0.03)


def test_the_ratio_of_two_gaussians_is_known():
    """Of N(0, 1) and N(1, 1): exp(x - 1/2), which a logistic regression can say exactly."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(20_000, 1, generator=generator), 1 + torch.randn(20_000, 1, generator=generator)
    x = torch.linspace(-1, 2, 7)[:, None]
    weight = density_ratio(source, torch.cat([x, source]), target)[:7]
    assert torch.allclose(weight / weight[3], (x - x[3]).exp()[:, 0].double(), rtol=0.08)


@pytest.mark.parametrize("flip", [1, 2])
def test_labels_of_the_target_change_no_score(lone_group, flip):
    first, other = measured(streams()), measured(streams(flip))
    assert {name: number.value for name, number in first.items()} == {n: number.value for n, number in other.items()}
    uses = Selection(Config()).uses()
    assert [name for name, fields in uses.streams.items() if "label" in fields] == ["source"]


class Unlabelled(ListStream):
    """Without a label to read."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {name: value for name, value in batch.items() if name != "label"}


def test_a_target_without_labels_is_enough(lone_group):
    given, bare = streams(), streams()
    for name in ("target", "train"):
        bare[name] = Unlabelled(given[name].image, given[name].label)
        bare[name].classes = given[name].classes
    assert {n: v.value for n, v in measured(bare).items()} == {n: v.value for n, v in measured(given).items()}


def test_one_sample_has_no_neighbour(lone_group):
    given = streams()
    given["target"] = made(1, 3)
    with pytest.raises(DataError, match="'target' has 1 samples"):
        measured(given)
