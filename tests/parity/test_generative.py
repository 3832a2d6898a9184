"""The same numbers as torch-fidelity and the authors of density and coverage, from the same features."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.evals import inception_score, kernel_distance, prdc
from pipeline.evals.frechet import distance, moments
from tests.contracts.components import context

REASON = "make parity installs it"


@pytest.fixture
def features():
    """Of 600 made and 700 real images: float32[N,24] and [M,24]."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(24, 24, generator=generator) / 5
    real = torch.randn(700, 24, generator=generator) @ turn + 1
    return 0.9 * torch.randn(600, 24, generator=generator) @ turn + 1.1, real


@pytest.fixture
def place(lone_group):
    return context({}, {}).place


def test_kernel_distance(features, place):
    theirs = pytest.importorskip("torch_fidelity.metric_kid", reason=REASON)
    found = theirs.kid_features_to_metric(*features, kid_subsets=20, kid_subset_size=250, verbose=False)
    values = kernel_distance.kernel_distances(*features, 250, 20, place)
    assert float(values.mean()) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-4)
    assert float(values.std(correction=0)) == pytest.approx(found["kernel_inception_distance_std"], rel=1e-4)


def test_frechet(features):
    theirs = pytest.importorskip("torch_fidelity.metric_fid", reason=REASON)
    statistics = [theirs.fid_features_to_statistics(x) for x in features]
    found = theirs.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert distance(*(moments(x) for x in features)) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score(splits, features):
    theirs = pytest.importorskip("torch_fidelity.metric_isc", reason=REASON)
    found = theirs.isc_features_to_metric(features[0], splits=splits)
    value, n, _, error = inception_score._score(features[0], splits, "made")
    assert n == 600 and value == pytest.approx(found["inception_score_mean"], rel=1e-9)
    if splits > 1:
        assert error * math.sqrt(splits) == pytest.approx(found["inception_score_std"], rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(k, features, place):
    theirs = pytest.importorskip("torch_fidelity.metric_prc", reason=REASON)
    found = theirs.prc_features_to_metric(*features, prc_neighborhood=k, verbose=False)
    own = prdc.compare(*features, k, place)
    assert float(own.precision.double().mean()) == pytest.approx(found["precision"], abs=1e-6)
    assert float(own.recall.double().mean()) == pytest.approx(found["recall"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage(k, features, place):
    theirs = pytest.importorskip("prdc", reason=REASON)
    made, real = features
    found = theirs.compute_prdc(real_features=real.numpy(), fake_features=made.numpy(), nearest_k=k)
    own = {name: float(values.double().mean()) for name, values in prdc.compare(made, real, k, place)._asdict().items()}
    assert own == pytest.approx({name: float(value) for name, value in found.items()}, abs=1e-6)
