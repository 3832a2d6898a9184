"""Distances between features and nearest neighbours, in float64, in blocks, shared out over the ranks.

Blocks are of fixed sizes, so that nothing depends on the number of ranks. Shape letters: N queries, M of the bank,
A and B rows of a block of each, D width, k neighbours.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.dist.group import Place, sum_over_ranks

ROWS = 1024
"""Queries compared at once."""
BANK = 8192
"""Of the bank compared at once: blocks of distances take 64 MiB."""
EQUAL = 1e-12
"""Squared distances under this part of the squared lengths are rounding: the two are the same."""


def squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances float64[A,B] of float64[A,D] and [B,D]; exactly 0 between equal rows."""
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    found = torch.addmm(lengths, x, y.T, alpha=-2)
    return found.masked_fill_(found <= EQUAL * lengths, 0)


def blocks(count: int, place: Place) -> Iterator[slice]:
    """This rank's blocks of ``count`` queries."""
    for first in range(0, count, ROWS)[place.rank :: place.world_size]:
        yield slice(first, min(first + ROWS, count))


def parts(count: int) -> Iterator[slice]:
    """The blocks of a bank."""
    for first in range(0, count, BANK):
        yield slice(first, min(first + BANK, count))


def wide(x: Tensor, block: slice, place: Place) -> Tensor:
    """A block of rows where it is computed with."""
    return x[block].to(place.device).double()


def nearest(x: Tensor, bank: Tensor, k: int, place: Place, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest of the bank, nearest first; every rank finds those of its blocks.

    Args:
        x: float[N,D], the same on every rank.
        bank: float[M,D], likewise.
        k: neighbours, at most M; fewer than M with ``own``.
        place: of this rank.
        own: int64[N], the row of the bank that each query is itself, and which is not its neighbour.

    Returns:
        Squared distances float64[N,k] and rows of the bank int64[N,k].
    """
    distance, index = torch.zeros(len(x), k, dtype=torch.float64), torch.zeros(len(x), k, dtype=torch.int64)
    for rows in blocks(len(x), place):
        query = wide(x, rows, place)
        best, where = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64).to(query.device)
        for part in parts(len(bank)):
            found = squared(query, wide(bank, part, place))
            if own is not None:
                mine = own[rows].to(query.device)[:, None] == torch.arange(part.start, part.stop, device=query.device)
                found = found.masked_fill_(mine, math.inf)
            values, columns = found.topk(min(k, found.shape[1]), dim=1, largest=False)
            best, where = torch.cat([best, values], dim=1), torch.cat([where, columns + part.start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1, largest=False)
            where = where.gather(1, order)
        distance[rows], index[rows] = best.cpu(), where.cpu()
    return sum_over_ranks(distance), sum_over_ranks(index)  # what other ranks have found is zero here
