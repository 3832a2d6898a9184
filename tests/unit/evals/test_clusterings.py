"""Fuzzy c-means, clusters of latents and ensembles: by hand, and where classes are clusters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.evals import ensemble_clustering, fuzzy_clustering, latent_clustering
from pipeline.evals._clusters import Given
from pipeline.evals._fuzzy import fuzzy_c_means
from pipeline.evals._latent import Course, FeatureVAE, latent_means
from pipeline.evals.ensemble_clustering import co_association, consensus
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity, make_streams

KINDS = {
    "fuzzy_clustering": lambda **own: fuzzy_clustering.FuzzyClustering(fuzzy_clustering.Config(**own)),
    "latent_clustering": lambda **own: latent_clustering.LatentClustering(
        latent_clustering.Config(steps=600, latent=4, **own)
    ),
    "ensemble_clustering": lambda **own: ensemble_clustering.EnsembleClustering(
        ensemble_clustering.Config(steps=200, members=2, **own)
    ),
}


def points(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)


def plain_c_means(x: np.ndarray, centres: np.ndarray, m: float, iterations: int) -> np.ndarray:
    """Bezdek's two equations, number by number."""
    u = np.zeros((len(x), len(centres)))
    for _ in range(iterations):
        d = np.array([[max(((a - c) ** 2).sum(), 1e-12) for c in centres] for a in x])  # it starts on samples
        for i, k in itertools.product(range(len(x)), range(len(centres))):
            u[i, k] = 1 / sum((d[i, k] / d[i, j]) ** (1 / (m - 1)) for j in range(len(centres)))
        centres = np.array([(u[:, k, None] ** m * x).sum(0) / (u[:, k] ** m).sum() for k in range(len(centres))])
    return u


@pytest.mark.parametrize("m", [1.1, 2.0])
def test_memberships_are_bezdeks(m):
    from sklearn.cluster import kmeans_plusplus

    x = points()
    start, _ = kmeans_plusplus(x.astype(np.float64), 4, random_state=3)
    found = fuzzy_c_means(Given(x, 4), m, 3, 7, 0.0)
    expected = plain_c_means(x.astype(np.float64), start, m, 7)
    np.testing.assert_allclose(found.membership, expected, atol=1e-8)
    assert found.partition == pytest.approx(((expected**2).sum(1).mean() - 0.25) / 0.75)


def test_with_a_fuzzifier_of_two_in_many_dimensions_it_collapses_and_says_so(lone_group, capsys):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 4
    x = functional.normalize(torch.eye(4, 200)[label] + 0.1 * torch.randn(60, 200, generator=generator))
    streams = {"val": ListStream(x, label)}

    def measured(fuzzifier: float) -> dict[str, float]:
        found = numbers(KINDS["fuzzy_clustering"](fuzzifier=fuzzifier), context({"image": Identity()}, streams))
        return {name.rpartition("/")[2]: number.value for name, number in found.items()}

    assert measured(1.1)["nmi"] == 1 and measured(1.1)["partition"] > 0.9 and not capsys.readouterr().err
    assert measured(3.0)["partition"] < 0.05
    assert "fuzzifier = 3 the 4 clusters have collapsed" in capsys.readouterr().err


@pytest.mark.parametrize("name", KINDS)
def test_clusters_of_classes_far_apart_are_the_classes(name, lone_group):
    label = torch.arange(80) % 4
    x = torch.eye(4, 12)[label] * torch.linspace(0.5, 3, 80)[:, None]
    x = x + 0.01 * torch.randn(80, 12, generator=torch.Generator().manual_seed(1))
    found = numbers(KINDS[name](), context({"image": Identity()}, {"val": ListStream(x, label)}))
    assert [found[f"{name}/{key}"].value for key in ("nmi", "ari", "accuracy")] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("name", KINDS)
def test_more_clusters_than_samples_are_refused(name, lone_group):
    with pytest.raises(ConfigError, match=rf"{name}\.clusters: 50 clusters of 31 samples"):
        numbers(KINDS[name](clusters=50), context({"image": Identity()}, make_streams()))


def test_an_ensemble_of_too_many_samples_is_refused(lone_group, monkeypatch):
    monkeypatch.setattr(ensemble_clustering, "MOST", 30)
    with pytest.raises(ConfigError, match=r"ensemble_clustering\.test: 31 samples .* the most is 30"):
        numbers(KINDS["ensemble_clustering"](), context({"image": Identity()}, make_streams()))


def test_co_association_counts_the_clusterings_that_put_a_pair_together():
    labels = np.array([[0, 0, 1, 1], [5, 5, 5, 6], [1, 2, 3, 3]])
    third = 1 / 3
    expected = [[1, 2 * third, third, 0], [2 * third, 1, third, 0], [third, third, 1, 2 * third], [0, 0, 2 * third, 1]]
    np.testing.assert_allclose(co_association(labels), expected, rtol=1e-6)
    assert consensus(co_association(labels), 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_the_ensemble_outvotes_members_that_are_wrong():
    """Each of fifteen clusterings has a quarter of its samples at chance; together they are right."""
    generator = np.random.default_rng(0)
    truth = np.arange(60) % 3
    labels = np.stack([np.where(generator.random(60) < 0.25, generator.integers(0, 3, 60), truth) for _ in range(15)])
    found = consensus(co_association(labels), 3)
    assert all(len(np.unique(found[truth == k])) == 1 for k in range(3)) and len(np.unique(found)) == 3
    assert all((own != truth).any() for own in labels)


def test_the_autoencoders_loss_is_the_evidence_bound():
    torch.manual_seed(0)
    model, x, noise = FeatureVAE(5, 7, 2), torch.randn(6, 5), torch.randn(6, 2)
    mean, log_variance = model.encoder(x).chunk(2, dim=1)
    latent = torch.distributions.Normal(mean, (log_variance / 2).exp())
    output = torch.distributions.Normal(model.decoder(mean + noise * latent.stddev), 1.0)
    divergence = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum(1)
    constant = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(())) * 5
    expected = (-output.log_prob(x).sum(1) + constant + 3 * divergence).mean()
    torch.testing.assert_close(model.loss(x, noise, 3.0), expected)


def test_latents_are_the_same_again_and_leave_the_generator_alone():
    course = Course(2, 8, 1.0, 20, 16, 1e-3, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = latent_means(points(), course)
    assert torch.equal(torch.rand(1), expected)
    np.testing.assert_array_equal(latent_means(points(), course), first)
    assert not np.allclose(latent_means(points(), course._replace(seed=2)), first)
