"""Collectives on rows, and sums over the global batch with gradient. They work on gloo and NCCL; alone, they cost nothing.

The convention of all gradients here: every rank calls ``backward`` on its own loss with the same upstream gradient, and
the engine then averages parameter gradients over the ranks. So the gradient of what was sent to others is the *sum* of
what they return; a slice or a mean of it would be wrong by a factor that no loss curve shows.

Shape letters: W ranks, n rows of this rank (the same number on every rank), N = W*n rows of the global batch, D and E
features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""The same two collectives under the names that torch gives them from 2.14 on, and before."""


def gather_into(out: Tensor, rows: Tensor) -> None:
    """Every rank's contiguous ``rows`` into ``out``, rank 0's first."""
    getattr(dist, GATHER)(out, rows)


def rank_and_world() -> tuple[int, int]:
    """This rank and the number of ranks; one rank where no group was started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(rows: Tensor) -> Tensor:
    """Every rank's rows, rank 0's first: [n,...] -> [W*n,...]. Without gradient."""
    world = rank_and_world()[1]
    if world == 1:
        return rows.detach()
    out = rows.new_empty(world * len(rows), *rows.shape[1:])
    gather_into(out, rows.detach().contiguous())
    return out


def reduce_scatter(rows: Tensor) -> Tensor:
    """This rank's part of the sum over ranks: [W*n,...] -> [n,...]. Without gradient."""
    world = rank_and_world()[1]
    if world == 1:
        return rows
    rows = rows.contiguous()
    out = rows.new_empty(len(rows) // world, *rows.shape[1:])
    getattr(dist, SCATTER)(out, rows)
    return out


def all_reduce(value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``value`` summed (or else) over the ranks, in place. Without gradient."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(value, op)
    return value


def broadcast(rows: Tensor, owner: int) -> Tensor:
    """Rank ``owner``'s rows on every rank; what the others pass gives shape and type alone."""
    rank, world = rank_and_world()
    if world == 1:
        return rows.detach()
    out = rows.detach().contiguous() if rank == owner else torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.broadcast(out, owner)
    return out


def reduce_to(value: Tensor, owner: int) -> Tensor:
    """The sum over ranks on rank ``owner``, in place; elsewhere ``value`` is left undefined."""
    if rank_and_world()[1] > 1:
        dist.reduce(value, owner)
    return value


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce(value.clone()) / rank_and_world()[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].clone()) / rank_and_world()[1]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's ``value``, with gradient."""
    return _MeanOverRanks.apply(value)  # pyright: ignore[reportReturnType]


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return reduce_scatter(grads[0])


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Every rank's rows, rank 0's first: [n,...] -> [N,...], with gradient."""
    return _GatherWithGradient.apply(rows)  # pyright: ignore[reportReturnType]


def global_mean(rows: Tensor) -> Tensor:
    """Mean over the rows of the global batch, in at least fp32, with gradient: [n,...] -> [...]."""
    return mean_over_ranks(wide(rows).mean(0))


def global_covariance(rows: Tensor, others: Tensor | None = None, *, correction: int = 1) -> Tensor:
    """Covariance of features over the global batch, in at least fp32, with gradient; D x E numbers travel, no rows.

    sum_i (x_i - mean x)(y_i - mean y)^T / (N - correction), as ``torch.cov`` has it; means come first, so that nothing
    cancels where they are large.

    Args:
        rows: [n,D], this rank's x.
        others: [n,E], the same samples' y; left out: x again.
        correction: 1: unbiased; 0: mean over the samples.

    Returns:
        [D,E].
    """
    centred = wide(rows) - global_mean(rows)
    second = centred if others is None else wide(others) - global_mean(others)
    total = len(rows) * rank_and_world()[1]
    with torch.autocast(rows.device.type, enabled=False):  # products of what was made wide stay so
        return mean_over_ranks(centred.T @ second / len(rows)) * (total / (total - correction))


def wide(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x if x.dtype == torch.float64 else x.float()
