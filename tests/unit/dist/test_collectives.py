"""Collectives with gradient: each rank's loss, averaged gradients, against autograd on the global batch in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dist.collectives import gather_with_gradient, global_covariance, global_mean
from pipeline.dist.group import process_group
from tests.ranks import start_ranks

ROWS, WIDTH = 12, 3
STEP = 1e-6


def data() -> tuple[Tensor, Tensor]:
    """Inputs [N,4], far from zero, and a weight [4,D]."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64) + 5
    return x, torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)


def gathered(mine: Tensor, rank: int) -> Tensor:
    """Each rank compares its rows with all, and weighs what others sent: a loss of its own."""
    return ((rank + 1) * (mine @ gather_with_gradient(mine).T / 100).sin()).mean()


def means(mine: Tensor, rank: int) -> Tensor:
    return (rank + 1) * global_mean(mine).pow(3).sum() + (mine - global_mean(mine)).pow(4).mean()


def covariances(mine: Tensor, rank: int) -> Tensor:
    return (rank + 1) * global_covariance(mine).pow(2).sum()


def between(mine: Tensor, rank: int) -> Tensor:
    return (rank + 1) * global_covariance(mine, mine[:, :2].pow(2), correction=0).sin().sum()


LOSSES = (gathered, means, covariances, between)


def written_out(name: str, rows: Tensor, rank: int, world: int) -> Tensor:
    """The same losses of all rows, without collectives."""
    mine = rows.chunk(world)[rank]
    factor = rank + 1
    if name == "gathered":
        return (factor * (mine @ rows.T / 100).sin()).mean()
    if name == "means":
        return factor * rows.mean(0).pow(3).sum() + (mine - rows.mean(0)).pow(4).mean()
    if name == "covariances":
        return factor * torch.cov(rows.T).pow(2).sum()
    both = torch.cov(torch.cat([rows, rows[:, :2].pow(2)], 1).T, correction=0)
    return factor * both[:WIDTH, WIDTH:].sin().sum()


def gradients() -> dict[str, tuple[list[list[float]], float]]:
    """Of each loss with respect to the weight, as an engine would have it; and by finite differences, of one element."""
    found = {}
    with process_group(1.0) as place:
        x, weight = data()
        mine = x.chunk(place.world_size)[place.rank]

        def mean_loss(loss: Callable[[Tensor, int], Tensor], weight: Tensor) -> Tensor:
            value = loss(mine @ weight, place.rank).detach().clone()
            dist.all_reduce(value)
            return value / place.world_size

        for loss in LOSSES:
            w = weight.clone().requires_grad_()
            loss(mine @ w, place.rank).backward()
            gradient = w.grad
            assert gradient is not None
            dist.all_reduce(gradient)
            shift = torch.zeros_like(weight)
            shift[1, 2] = STEP
            slope = (mean_loss(loss, weight + shift) - mean_loss(loss, weight - shift)) / (2 * STEP)
            found[loss.__name__] = ((gradient / place.world_size).tolist(), float(slope))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_gradient_is_that_of_the_mean_loss_over_the_global_batch(world):
    ended = start_ranks(world, gradients)
    assert [e.problem for e in ended] == [None] * world
    for loss in LOSSES:
        name = loss.__name__
        x, weight = data()
        weight.requires_grad_()
        torch.stack([written_out(name, x @ weight, rank, world) for rank in range(world)]).mean().backward()
        assert weight.grad is not None
        expected = weight.grad.numpy()
        for end in ended:
            gradient, slope = end.value[name]
            assert np.array(gradient) == pytest.approx(expected, rel=1e-10, abs=1e-10), name
            assert slope == pytest.approx(expected[1, 2], rel=1e-6, abs=1e-7), name


def test_values_need_no_group_and_low_precision_does_not_reach_them():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 5, generator=generator) + 100
    torch.testing.assert_close(global_covariance(rows), torch.cov(rows.double().T).float(), rtol=1e-3, atol=1e-4)
    halves = rows.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = global_covariance(halves)
    assert found.dtype == global_mean(halves).dtype == torch.float32
    torch.testing.assert_close(found, torch.cov(halves.double().T).float(), rtol=1e-3, atol=1e-3)
