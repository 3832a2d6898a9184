"""Maximum mean discrepancy with several Gaussian kernels, over the global batch, without the matrix of all pairs.

Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012); several kernels summed, as Long et al., "Learning Transferable
Features with Deep Adaptation Networks" (ICML 2015) have them; the source weighted by classes as Yan et al., "Mind the
Class Weight Bias" (CVPR 2017) write it::

    MMD^2 = | sum_i w_i phi(s_i) - 1/M sum_j phi(t_j) |^2,    k(x, y) = sum_b exp(-|x - y|^2 / (2 b sigma^2))

sigma^2 is the mean squared distance of all pairs of the batch, source and target together, and constant: no gradient
runs through it. Each rank computes its own rows against all; value and gradient come out of one walk over tiles, so
that a tile's kernels are computed once, and those whose bandwidths are halves of each other by squaring.

Shape letters: n rows of a domain on this rank, W ranks, N = W * n rows on all, D width, R = 2 N rows of both domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.dist.collectives import all_gather, all_reduce, gather_with_gradient, rank_and_world, wide

Estimator = Literal["unbiased", "biased", "linear"]
BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Parts of sigma^2, as Long's library has them."""
TILES = {"cpu": 512, "cuda": 4096}
"""Rows and columns of a tile."""
LEAST = 1e-6
"""Of what pairs of different samples weigh together, below which there is nothing to compare."""


def mmd(
    source: Tensor,
    target: Tensor,
    *,
    weights: Tensor | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    estimator: Estimator = "unbiased",
    tile: int | None = None,
) -> Tensor:
    """The squared MMD of two domains.

    Args:
        source: float[n,D], this rank's rows.
        target: float[n,D].
        weights: float[n], not negative, of the source's samples, in any unit; left out: all alike. Where no two
            samples of the global batch have a weight, the result is 0, without gradient.
        bandwidths: parts of sigma^2.
        estimator: "unbiased" leaves out pairs of a sample with itself, and may be negative (U-statistic); "biased" is
            what the formula says (V-statistic, at least about 1/N); "linear" compares each sample with the next of the
            global batch alone, around the ring: unbiased, of a cost that grows with N, and noisy.
        tile: rows and columns that are looked at together; left out: as the device likes it.

    Returns:
        float[], whose mean over ranks is the value; its gradient follows the convention of
        :mod:`pipeline.dist.collectives`.

    Raises:
        ConfigError: the global batch has one sample of each domain, and the estimator needs two; weights with "linear".
    """
    count = len(source) * rank_and_world()[1]
    if estimator != "biased" and count < 2:
        raise ConfigError(
            f"the {estimator} MMD compares samples of a domain with each other, and the global batch has one of each; "
            'raise run.global_batch, or set estimator = "biased"'
        )
    if estimator == "linear":
        if weights is not None:
            raise ConfigError('estimator = "linear" knows no weights; take "unbiased" or "biased"')
        return _linear(wide(source), wide(target), bandwidths)
    rows = torch.cat([wide(source), wide(target)])
    own = rows.new_ones(len(source)) if weights is None else weights.detach().to(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return _Mmd.apply(rows, own, tuple(bandwidths), estimator == "unbiased", tile)  # pyright: ignore


class _Kernels(NamedTuple):
    """Gaussian kernels of squared distances."""

    rates: Tensor
    """float[], 1 / (2 b sigma^2) of the widest."""
    factors: tuple[float, ...]
    """Of the rates, against the widest's; rising from 1."""

    @classmethod
    def of(cls, rows: Tensor, bandwidths: Sequence[float]) -> _Kernels:
        """For rows that are centred over all ranks: the mean squared distance is twice the mean square."""
        spread = all_reduce(rows.square().sum(1).mean()) / rank_and_world()[1] * 2
        widest = max(bandwidths)
        rate = 1 / (2 * widest * spread).clamp_min(torch.finfo(spread.dtype).tiny * 1e8)
        return cls(rate, tuple(sorted(widest / b for b in bandwidths)))

    def add(self, distances: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Sum of the kernels, and of -1/rate times their derivatives; ``distances`` is used up."""
        first = distances.mul_(-self.rates)
        power = first.exp() if self._doubling else None
        total, slopes = torch.zeros_like(first), torch.zeros_like(first) if slope else None
        for factor in self.factors:
            if power is not None and factor > 1:
                power.square_()
            value = (first * factor).exp_() if power is None else power
            total += value
            if slopes is not None:
                slopes.add_(value, alpha=factor)
        return total, slopes

    @property
    def _doubling(self) -> bool:
        """Each is twice the one before."""
        return all(b == 2 * a for a, b in pairwise(self.factors))


class _Block(NamedTuple):
    """Rows of a domain against those of a domain on all ranks."""

    rows: slice
    columns: slice
    scale: Tensor
    """Of all products of weights."""
    offset: int | None
    """Number of the first row's sample among the columns, which is not compared with itself; None: all are compared."""


class _Mmd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, own: Tensor, bandwidths: tuple[float, ...], unbiased: bool, tile: int | None
    ) -> Tensor:
        rank, world = rank_and_world()
        n = len(own)
        centred = rows - all_reduce(rows.mean(0)) / world
        kernels = _Kernels.of(centred, bandwidths)
        columns = torch.cat([all_gather(centred[:n]), all_gather(centred[n:])])
        total = all_reduce(own.sum())
        weights = own / total.clamp_min(torch.finfo(own.dtype).tiny)
        many = len(columns) // 2
        weights = torch.cat([weights, weights.new_full((n,), 1 / many)])
        by_column = torch.cat([all_gather(weights[:n]), all_gather(weights[n:])])
        apart = [1 - by_column[half].square().sum() for half in (slice(0, many), slice(many, None))]
        sides = [1 / a.clamp_min(LEAST) if unbiased else torch.ones_like(a) for a in apart]
        there = (total > 0) & (apart[0] > LEAST if unbiased else total > 0)
        halves, places = (slice(0, n), slice(n, None)), (slice(0, many), slice(many, None))
        same, cross = rank * n if unbiased else None, -torch.ones_like(total)
        blocks = [_Block(h, p, s, same) for h, p, s in zip(halves, places, sides, strict=True)]
        blocks += [_Block(halves[0], places[1], cross, None), _Block(halves[1], places[0], cross, None)]
        walk = _Walk(centred, columns, weights, by_column, kernels, tile or TILES.get(rows.device.type, TILES["cpu"]))
        value, gradient = walk.over(blocks, slope=ctx.needs_input_grad[0])
        ctx.gradient = None if gradient is None else gradient.mul_(there * world)
        return value * there * world

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None if ctx.gradient is None else grads[0] * ctx.gradient, None, None, None, None)


class _Walk(NamedTuple):
    """All pairs of this rank's rows with all columns, tile by tile."""

    rows: Tensor
    columns: Tensor
    weights: Tensor
    by_column: Tensor
    kernels: _Kernels
    tile: int

    def over(self, blocks: Sequence[_Block], slope: bool) -> tuple[Tensor, Tensor | None]:
        """Value of this rank's rows, and the gradient of the sum of all ranks' values with respect to them."""
        squares = self.rows.square().sum(1), self.columns.square().sum(1)
        value = self.rows.new_zeros(())
        # Each column times its weight, and the weight: one product gives both sums that the gradient needs.
        weighted = torch.cat([self.columns, self.columns.new_ones(len(self.columns), 1)], 1)
        weighted.mul_(self.by_column[:, None])
        sums = torch.zeros(len(self.rows), weighted.shape[1], dtype=self.rows.dtype, device=self.rows.device)
        for block in blocks:
            for r, c in self._tiles(block):
                distances = torch.addmm(squares[1][c], self.rows[r], self.columns[c].T, alpha=-2)
                distances.add_(squares[0][r][:, None]).clamp_min_(0)
                if block.offset is not None:
                    first = block.offset + r.start - block.rows.start + block.columns.start - c.start
                    if -distances.shape[0] < first < distances.shape[1]:
                        distances.diagonal(first).fill_(torch.inf)
                total, slopes = self.kernels.add(distances, slope)
                value += block.scale * (self.weights[r] @ (total @ self.by_column[c]))
                if slopes is not None:
                    sums[r] += block.scale * (slopes @ weighted[c])
        if not slope:
            return value, None
        # Both (i, j) and (j, i) hold the pair, and |x - y|^2 has the derivative 2 (x - y).
        pulls = sums[:, :-1].neg_().addcmul_(sums[:, -1:], self.rows)  # in place: these are the largest matrices here
        return value, pulls.mul_(-4 * self.kernels.rates * self.weights[:, None])

    def _tiles(self, block: _Block) -> Iterator[tuple[slice, slice]]:
        ends = block.rows.stop or len(self.rows), block.columns.stop or len(self.columns)
        for c in range(block.columns.start, ends[1], self.tile):
            for r in range(block.rows.start, ends[0], self.tile):
                yield slice(r, min(r + self.tile, ends[0])), slice(c, min(c + self.tile, ends[1]))


def _linear(source: Tensor, target: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Each sample and its neighbour on the ring of the global batch."""
    here = torch.cat([source, target]).detach()
    kernels = _Kernels.of(here - all_reduce(here.mean(0)) / rank_and_world()[1], bandwidths)
    s, t = gather_with_gradient(source), gather_with_gradient(target)
    after_s, after_t = s.roll(-1, 0), t.roll(-1, 0)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distances = (x - y).square().sum(1)
        return torch.stack([(-distances * kernels.rates * f).exp() for f in kernels.factors]).sum(0)

    return (kernel(s, after_s) + kernel(t, after_t) - kernel(s, after_t) - kernel(after_s, t)).mean()
