"""k-means, whitening, balanced assignments and agreement: against closed forms, brute force and scikit-learn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional

from pipeline.dist.collectives import rank_and_world
from pipeline.dist.group import process_group
from pipeline.nn.clustering import kmeans as module
from pipeline.nn.clustering.agreement import mutual_information
from pipeline.nn.clustering.kmeans import kmeans
from pipeline.nn.clustering.sinkhorn import sinkhorn
from pipeline.nn.clustering.whitening import whitened
from tests.ranks import start_ranks


def blobs(count: int = 203, width: int = 5, centres: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    middle = 4 * torch.randn(centres, width, generator=generator)
    own = torch.randint(0, centres, (count,), generator=generator)
    return middle[own] + torch.randn(count, width, generator=generator), torch.rand(count, generator=generator)


def share(rows: Tensor) -> Tensor:
    """Of this rank: unequal parts."""
    rank, world = rank_and_world()
    ends = [0, *(int(len(rows) * (k + 1) ** 2 / world**2) for k in range(world))]
    return rows[ends[rank] : ends[rank + 1]]


def lloyd(x: np.ndarray, centres: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Plainly, in float64, where no cluster becomes empty."""
    for _ in range(iterations):
        label = ((x[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        centres = np.stack([x[label == k].mean(0) for k in range(len(centres))])
    return ((x[:, None] - centres[None]) ** 2).sum(2).argmin(1), centres


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_kmeans_is_lloyds_from_the_samples_with_the_smallest_draws(iterations, monkeypatch, lone_group):
    monkeypatch.setattr(module, "SCORES", 6 * 64)
    x, draws = blobs()
    label, centres = lloyd(x.double().numpy(), x[draws.argsort()[:6]].double().numpy(), iterations)
    found = kmeans(x, 6, draws, iterations)
    assert np.array_equal(found.label.numpy(), label)
    np.testing.assert_allclose(found.centres.numpy(), centres, atol=1e-5)
    assert found.sizes.tolist() == np.bincount(label, minlength=6).tolist()
    assert found.inertia == pytest.approx(((x.numpy() - centres[label]) ** 2).sum(1).mean(), rel=1e-5)


def test_it_ends_where_scikit_learns_does_from_the_same_start(lone_group):
    x, draws = blobs()
    start = x[draws.argsort()[:6]].numpy()
    peer = KMeans(6, init=start, n_init=1, algorithm="lloyd", tol=0).fit(x.numpy())
    found = kmeans(x, 6, draws, 300)
    assert np.array_equal(found.label.numpy(), peer.labels_)
    assert found.inertia * len(x) == pytest.approx(peer.inertia_, rel=1e-5)


def test_an_empty_cluster_is_given_half_of_the_largest(lone_group):
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.1, 0.0], [9.0, 8.0], [9.1, 8.0], [9.2, 8.1]])
    found = kmeans(x, 3, torch.tensor([0.0, 0.1, 0.5, 0.6, 0.2, 0.7, 0.8]), 20)  # two centres at one point
    assert (found.sizes > 0).all() and sorted(found.sizes.tolist()) == [2, 2, 3]


def clustered() -> tuple[Any, ...]:
    x, draws = blobs()
    with process_group(1.0):
        found = kmeans(share(x), 6, share(draws), 5)
        arrays = [t.numpy() for t in (found.label, found.centres, found.sizes, whitened(share(x), 3))]
        return (*arrays, found.inertia)


@pytest.mark.parametrize("world", [2, 4])
def test_kmeans_and_whitening_do_not_depend_on_ranks(world, lone_group):
    ended = start_ranks(world, clustered)
    assert [e.problem for e in ended] == [None] * world
    x, draws = blobs()
    whole, white = kmeans(x, 6, draws, 5), whitened(x, 3)
    assert np.array_equal(np.concatenate([e.value[0] for e in ended]), whole.label)
    np.testing.assert_allclose(np.concatenate([e.value[3] for e in ended]), white, rtol=0, atol=1e-5)
    for end in ended:
        assert np.array_equal(end.value[1], ended[0].value[1]) and np.array_equal(end.value[2], whole.sizes)
        np.testing.assert_allclose(end.value[1], whole.centres, rtol=0, atol=1e-5)
        assert end.value[4] == pytest.approx(whole.inertia, rel=1e-6)


def test_whitening_is_scikit_learns_at_unit_length():
    x = blobs()[0] * torch.tensor([1.0, 5.0, 0.2, 2.0, 0.01]) + 100
    peer = torch.from_numpy(PCA(3, whiten=True, svd_solver="full").fit_transform(x.double().numpy()))
    found, peer = whitened(x, 3).double(), functional.normalize(peer)
    turn = (found * peer).sum(0).sign()
    torch.testing.assert_close(found * turn, peer, rtol=0, atol=1e-4)


def test_directions_without_variance_are_left_out():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator) @ torch.randn(2, 6, generator=generator)
    assert whitened(x, 5).shape == (50, 2) and whitened(x, 1).shape == (50, 1)


def plain_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Matrix by matrix, in float64, as the authors' pseudocode has it."""
    q = (scores.double() / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def cosines(count: int = 40, prototypes: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pair = [functional.normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (count, prototypes)]
    return pair[0] @ pair[1].T


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_pseudocode(epsilon, iterations):
    found = sinkhorn(cosines(), epsilon, iterations)
    torch.testing.assert_close(found.double(), plain_sinkhorn(cosines(), epsilon, iterations), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(40))


def test_sinkhorn_converges_to_equal_clusters_and_to_the_best_assignment():
    found = sinkhorn(cosines(), 0.05, 3000)
    torch.testing.assert_close(found.sum(0), torch.full((7,), 40 / 7), rtol=1e-4, atol=1e-4)
    # With little entropy it is the best one-to-one assignment, which all orders of three samples show.
    few = cosines(3, 3)
    best = max(itertools.permutations(range(3)), key=lambda order: sum(float(few[i, k]) for i, k in enumerate(order)))
    assert sinkhorn(few, 0.006, 3000).argmax(1).tolist() == list(best)


def test_sinkhorn_survives_cosines_that_fp32_would_lose():
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    found = sinkhorn(scores, 0.005, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    assert found[2, 1] > 0.99


def test_samples_of_no_weight_do_not_count():
    scores, weights = cosines(), torch.ones(40)
    weights[:15] = 0
    torch.testing.assert_close(
        sinkhorn(scores, 0.05, 3, weights)[15:], sinkhorn(scores[15:], 0.05, 3), atol=1e-6, rtol=0
    )


def assigned() -> np.ndarray:
    with process_group(1.0):
        return sinkhorn(share(cosines()), 0.05, 3).numpy()


@pytest.mark.parametrize("world", [2, 4])
def test_sinkhorn_is_over_all_ranks(world):
    ended = start_ranks(world, assigned)
    assert [e.problem for e in ended] == [None] * world
    found = np.concatenate([e.value for e in ended])
    np.testing.assert_allclose(found, sinkhorn(cosines(), 0.05, 3), rtol=1e-6, atol=1e-9)


def test_mutual_information_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, k, (300,), generator=generator) for k in (5, 9))
    second[:150] = first[:150]
    expected = normalized_mutual_info_score(first.numpy(), second.numpy())
    assert mutual_information(first, second) == pytest.approx(expected)
    assert mutual_information(first, first + 3) == pytest.approx(1)
    assert mutual_information(first, torch.zeros_like(first)) == 0
    assert not math.isnan(mutual_information(torch.zeros(4), torch.zeros(4)))
