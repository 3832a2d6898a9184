"""Quantisers against brute force, the paper's updates written out, and the listing of finite scalar quantisation."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.nn.generative.codebook import Codebook, Scalars, perplexity

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, 2, 5, generator=GENERATOR)


def codebook(**settings):
    torch.manual_seed(1)
    return Codebook(7, 4, **{"commitment": 0.25, "decay": None, "cosine": False, "revive": 0.0} | settings)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_nearest_code_and_what_its_distance_costs(cosine):
    quantiser = codebook(cosine=cosine)
    x, weight = X.double().numpy(), quantiser.weight.detach().double().numpy()
    if cosine:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    found = quantiser(X)
    cost = np.zeros(3)
    for b, i, j in itertools.product(range(3), range(2), range(5)):
        squared = ((x[b, :, i, j] - weight) ** 2).sum(axis=1)
        assert int(found.index[b, i, j]) == squared.argmin()
        cost[b] += squared.min() / 40
        np.testing.assert_allclose(found.z[b, :, i, j].detach(), weight[squared.argmin()], atol=1e-6)
    np.testing.assert_allclose(found.losses.detach(), 1.25 * cost, rtol=1e-5)
    torch.testing.assert_close(quantiser.lookup(found.index), found.z, rtol=0, atol=1e-6)


def test_gradients_go_straight_through_and_each_side_pays_its_own():
    quantiser, x = codebook(), X.clone().requires_grad_()
    found = quantiser(x)
    (found.z * 3).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))
    assert quantiser.weight.grad is None
    x.grad = None
    found = quantiser(x)
    found.losses.sum().backward()
    torch.testing.assert_close(x.grad, 0.25 * 2 / 40 * (x - found.z).detach())
    expected = torch.zeros(7, 4)
    rows, index = X.movedim(1, -1).reshape(-1, 4), found.index.flatten()
    for row, k in zip(rows, index.tolist(), strict=True):
        expected[k] += 2 / 40 * (quantiser.weight[k].detach() - row)
    torch.testing.assert_close(quantiser.weight.grad, expected)


def test_moving_averages_are_the_papers():
    """Appendix A.1: N <- g N + (1 - g) n, m <- g m + (1 - g) sum, e = m / N, over all micro-batches of an update."""
    quantiser = codebook(decay=0.9)
    counts, sums = np.ones(7), quantiser.weight.double().numpy().copy()
    for _ in range(3):
        n, total = np.zeros(7), np.zeros((7, 4))
        for part in torch.randn(2, 3, 4, 2, 5, generator=GENERATOR):
            index = quantiser(part).index
            quantiser.note(part, index)
            for row, k in zip(part.movedim(1, -1).reshape(-1, 4), index.flatten().tolist(), strict=True):
                n[k] += 1
                total[k] += row.double().numpy()
        quantiser.learn(torch.empty(0, 4), 0.5)
        counts, sums = 0.9 * counts + 0.1 * n, 0.9 * sums + 0.1 * total
        np.testing.assert_allclose(quantiser.counts, counts, rtol=1e-5)
        np.testing.assert_allclose(quantiser.weight, sums / counts[:, None], rtol=1e-3, atol=1e-4)
    assert not list(quantiser.parameters())


def test_dead_codes_start_anew_and_the_living_stay():
    quantiser = codebook(decay=0.5, revive=0.6)
    with torch.no_grad():
        quantiser.weight[:] = torch.tensor([[100.0 + k] * 4 for k in range(7)])
        quantiser.weight[2] = 0.0  # the nearest of all there is
        quantiser.sums.copy_(quantiser.weight)
    quantiser.note(X, quantiser(X).index)
    quantiser.learn(torch.arange(12.0).view(3, 4), 0.9)  # counts fall to 0.5, but for one; three may start anew
    assert quantiser.weight[[0, 1, 3]].tolist() == torch.arange(12.0).view(3, 4).tolist()
    torch.testing.assert_close(quantiser.weight[4:, 0], torch.tensor([104.0, 105.0, 106.0]), rtol=1e-3, atol=0)
    assert quantiser.counts.tolist() == pytest.approx([0.6, 0.6, 15.5, 0.6, 0.5, 0.5, 0.5])
    # what was started anew keeps its place as if it had stood for something
    torch.testing.assert_close(quantiser.sums[0] / quantiser.counts[0], quantiser.weight[0])


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 2), (4,)])
def test_scalars_are_those_of_the_papers_listing(levels):
    """bound, round and codes_to_indexes of Mentzer et al., appendix A.1, in NumPy."""
    x = torch.randn(6, len(levels), 3, 3, generator=GENERATOR) * 3
    found = Scalars(levels)(x)
    z, per = x.movedim(1, -1).double().numpy(), np.array(levels)
    half = (per - 1) * (1 + 1e-3) / 2
    offset = np.where(per % 2 == 1, 0.0, 0.5)
    shift = np.arctanh(offset / half)
    whole = np.round(np.tanh(z + shift) * half - offset)
    width = per // 2
    np.testing.assert_allclose(found.z.movedim(1, -1), whole / width, atol=1e-6)
    basis = np.concatenate([[1], np.cumprod(per[:-1])])
    np.testing.assert_array_equal(found.index, ((whole + width) * basis).sum(axis=-1))
    assert int(found.index.min()) >= 0 and int(found.index.max()) < np.prod(per)
    every = torch.arange(int(np.prod(per))).view(-1, 1, 1)
    codes = Scalars(levels).lookup(every)
    assert len({tuple(row) for row in codes.flatten(1).tolist()}) == len(every)
    torch.testing.assert_close(Scalars(levels).lookup(found.index), found.z)


def test_scalars_pass_the_gradient_of_their_bound():
    x = torch.tensor([0.3, -1.2]).view(1, 2, 1, 1).double().requires_grad_()
    Scalars((5, 5))(x).z.sum().backward()
    expected = (1 - np.tanh([0.3, -1.2]) ** 2) * 2 * (1 + 1e-3) / 2
    np.testing.assert_allclose(x.grad.flatten(), expected, rtol=1e-5)


def test_perplexity_is_the_number_of_codes_used_alike():
    assert float(perplexity(torch.tensor([3.0, 0.0, 3.0, 3.0]))) == pytest.approx(3)
    share = np.array([0.5, 0.25, 0.25])
    assert float(perplexity(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
