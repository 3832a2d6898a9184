"""Losses that compare every sample of the global batch with every other, exact, without the matrix of all pairs.

One way for all of them: the columns of the matrix are gathered once, logits are computed tile by tile in fp32 and never
kept, what a loss needs of them (log-sum-exps of rows and columns, or a sum) is merged over tiles and ranks, tiles are
computed again in the backward pass, and the columns' gradients go home in one reduce-scatter. Memory grows with the
batch and not with its square, and the traffic is half of gathering both sides (see :func:`traffic_bytes`).

With b rows on this rank, B columns on all, logits X = scale * rows @ columns^T (+ bias):

- :func:`info_nce`: CLIP's loss (Radford et al. 2021), -1/2b sum_i [log softmax_j(X)_ii + log softmax_i(X)_ii]
- :func:`sigmoid_loss`: SigLIP's (Zhai et al. 2023), 1/b sum_ij softplus(-z_ij X_ij), z_ii = 1, else -1
- :func:`nt_xent`: SimCLR's (Chen et al. 2020), -1/2b sum_i log softmax_{j != i}(X)_{i,other view of i}
- :func:`in_batch_nce`: MoCo v3's (Chen et al. 2021), rows to columns only, columns without gradient
- :func:`queue_nce`: MoCo's (He et al. 2020), one positive per row and the queue as columns

Each rank returns the mean over *its own* rows; feature gradients are summed over ranks in the backward pass; the engine
then averages parameter gradients. The result is the exact gradient of the mean over all rows, the temperature's
included.

Memory: the running maximum and sum of a log-sum-exp as in Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018). Shape letters: n rows, m columns of this rank, W ranks, M = W * m columns of all, D width, K queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dist.collectives import all_gather, all_reduce, broadcast, rank_and_world, reduce_scatter, reduce_to
from pipeline.nn.tile_kernels import kernels_for

Columns = Literal["gathered", "blocks", "here"]
"""How columns are shared: all gathered at once; block by block from their owners, so that memory stays at the local
batch; or these alone, without any traffic."""

Reduction = Literal["mean", "none"]

TILES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a tile: large enough for the matrix product, small enough for cache and memory."""


@dataclass(frozen=True)
class _Pairs:
    """What is computed of all pairs, and where the columns come from."""

    kind: Literal["softmax", "sigmoid"]
    share: Columns = "gathered"
    both: bool = False
    """Softmax over columns too, and not over rows alone."""
    skip_self: bool = False
    """Row i and column i are the same sample, which is not compared with itself."""
    tile: int | None = None


class _Tiles:
    """The walk over blocks and tiles, the same in both passes."""

    def __init__(self, pairs: _Pairs, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.pairs, self.columns = pairs, columns.detach()
        # The scale goes into the rows: n * D products instead of n * M.
        self.rows = rows.detach() * scale
        self.rank, self.world = (0, 1) if pairs.share == "here" else rank_and_world()
        self.gathered = all_gather(columns) if pairs.share == "gathered" else None
        self.size = pairs.tile or TILES.get(rows.device.type, TILES["cpu"])
        self.bias = None if bias is None else bias.detach().to(rows).expand(self.size).contiguous()
        self.kernels = kernels_for(rows.device, len(rows) * self.world * len(columns))

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(owner, first column, columns) of each block; gathered columns are one block, which has no one owner: -1."""
        if self.gathered is not None:
            yield -1, 0, self.gathered
            return
        for owner in range(self.world):
            block = self.columns if self.world == 1 else broadcast(self.columns, owner)
            yield owner, owner * len(self.columns), block

    def tiles(self, first: int, block: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns in the block, logits) of each tile."""
        for c in range(0, len(block), self.size):
            cols = slice(c, min(c + self.size, len(block)))
            for r in range(0, len(self.rows), self.size):
                rows = slice(r, min(r + self.size, len(self.rows)))
                logits = self.product(self.rows[rows], block[cols])
                if self.pairs.kind == "sigmoid":
                    self.same(logits, r, first + c).neg_()
                elif self.pairs.skip_self:
                    self.same(logits, r, first + c).fill_(-math.inf)
                yield rows, cols, logits

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits of all pairs."""
        return rows @ columns.T if self.bias is None else torch.addmm(self.bias[: len(columns)], rows, columns.T)

    def same(self, tile: Tensor, row: int, column: int) -> Tensor:
        """The entries of a tile whose row and column are of the same sample, as a view: a piece of a diagonal."""
        offset = self.rank * len(self.columns) + row - column
        if -tile.shape[0] < offset < tile.shape[1]:
            return tile.diagonal(offset)
        return tile[:0, 0]


class _LogSumExp:
    """log(sum(exp(x))) of many places, merged as the values come."""

    def __init__(self, walk: _Tiles, places: int) -> None:
        self.add_exp = walk.kernels.add_exp
        self.largest = walk.rows.new_full((places,), -math.inf)
        self.total = walk.rows.new_zeros(places)

    def add(self, places: slice, logits: Tensor, dim: int) -> None:
        """Take in a tile: its maximum and sum along ``dim``."""
        seen = self.add_exp(logits, self.largest[places], self.total[places], dim)
        self.largest[places], self.total[places] = seen

    def merge_over_ranks(self) -> None:
        """Take in what the other ranks have seen."""
        largest = all_reduce(self.largest.clone(), dist.ReduceOp.MAX)
        self.total = all_reduce(self.total * (self.largest - largest).exp())
        self.largest = largest

    def value(self) -> Tensor:
        """The logarithms of the sums."""
        return self.largest + self.total.log()


def _softmax_forward(walk: _Tiles) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of this rank's rows, float[n], and of all columns, float[M] (empty when only rows count)."""
    row, columns = _LogSumExp(walk, len(walk.rows)), [walk.rows.new_empty(0)]
    for _, first, block in walk.blocks():
        column = _LogSumExp(walk, len(block) if walk.pairs.both else 0)
        for rows, cols, logits in walk.tiles(first, block):
            row.add(rows, logits, 1)
            if walk.pairs.both:
                column.add(cols, logits, 0)
        if walk.pairs.both and walk.world > 1:
            column.merge_over_ranks()
        columns.append(column.value())
    return row.value(), torch.cat(columns)


def _sigmoid_forward(walk: _Tiles) -> Tensor:
    """The sum of softplus over each row, float[n]."""
    total = walk.rows.new_zeros(len(walk.rows))
    for _, first, block in walk.blocks():
        for rows, _, logits in walk.tiles(first, block):
            total[rows] += walk.kernels.softplus_sum(logits)
    return total


class _OverAllPairs(torch.autograd.Function):
    """What a loss needs of all pairs: float[n] of this rank's rows, and float[m] of its columns where both count.

    softmax: log-sum-exp of each row, and of each column. sigmoid: sum of softplus(-z x) of each row, and nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, pairs: _Pairs
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            ctx.walk = walk = _Tiles(pairs, rows, columns, scale, bias)
            if pairs.kind == "sigmoid":
                ctx.save_for_backward(rows, scale)
                return _sigmoid_forward(walk), rows.new_empty(0)
            row, column = _softmax_forward(walk)
            ctx.save_for_backward(rows, scale, row, column)
            first = walk.rank * len(columns)
            return row.clone(), column[first : first + len(columns)].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, *sums = ctx.saved_tensors
        walk: _Tiles = ctx.walk
        with torch.autocast(rows.device.type, enabled=False):
            upstream = (grads[0], all_gather(grads[1]) if walk.pairs.both else grads[1])
            return _backward(walk, rows, scale, sums, upstream, ctx.needs_input_grad)


def _backward(
    walk: _Tiles,
    rows: Tensor,
    scale: Tensor,
    sums: list[Tensor],
    upstream: tuple[Tensor, Tensor],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of rows, columns, scale and bias, with P = dL/dX: scale P T, scale P^T I, sum P <I,T>, sum P."""
    by_row = torch.zeros_like(rows)
    total, own = rows.new_zeros(1), None
    for owner, first, block in walk.blocks():
        by_column = torch.zeros_like(block) if needed[1] else None
        for r, c, logits in walk.tiles(first, block):
            p = _tile_gradient(walk, sums, upstream, (r, c), logits, first)
            by_row[r].addmm_(p, block[c])
            if by_column is not None:
                by_column[c].addmm_(p.T, walk.rows[r])
            if needed[3]:
                total += p.sum()
        if by_column is not None and owner == -1:
            own = reduce_scatter(by_column)
        elif by_column is not None:
            reduced = reduce_to(by_column, owner) if walk.world > 1 else by_column
            own = reduced if owner == walk.rank else own
    of_scale = (rows * by_row).sum().view(1) if needed[2] else None
    return by_row.mul_(scale), own, of_scale, total if needed[3] else None, None


def _tile_gradient(
    walk: _Tiles,
    sums: list[Tensor],
    upstream: tuple[Tensor, Tensor],
    place: tuple[slice, slice],
    logits: Tensor,
    first: int,
) -> Tensor:
    """dL/dX of a tile, which takes the place of its logits."""
    rows, cols = place
    if walk.pairs.kind == "sigmoid":
        p = walk.kernels.sigmoid_gradient(logits, upstream[0][rows])
        walk.same(p, rows.start, first + cols.start).neg_()
        return p
    row, column = sums
    places = slice(first + cols.start, first + cols.stop)
    down = (column[places], upstream[1][places]) if walk.pairs.both else (None, None)
    return walk.kernels.softmax_gradient(logits, row[rows], upstream[0][rows], *down)


def _exact(x: Tensor) -> Tensor:
    """At least fp32: half the digits of a logit of 100 are none."""
    return x if x.dtype == torch.float64 else x.float()


def _positives(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """Logits of the pairs that belong together, float[n]."""
    return (rows * columns).sum(dim=1) * scale


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    return losses if reduction == "none" else losses.mean()


def info_nce(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    share: Columns = "gathered",
    tile: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Symmetric softmax loss over the global batch.

    Args:
        rows: unit vectors [n,D] of this rank, e.g. of images.
        columns: unit vectors [n,D] of this rank, e.g. of texts; row i and column i belong together.
        scale: [1], the inverse temperature.
        share: how columns reach the other ranks.
        tile: rows and columns of a tile; left out: by the device.
        reduction: "none" gives the part of each sample, whose mean is the loss.

    Returns:
        Scalar, the mean over this rank's pairs; or float[n].
    """
    rows, columns, scale = _exact(rows), _exact(columns), _exact(scale)
    pairs = _Pairs("softmax", share, both=True, tile=tile)
    across, down = _OverAllPairs.apply(rows, columns, scale, None, pairs)
    return _reduced((across + down) / 2 - _positives(rows, columns, scale), reduction)


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    share: Columns = "gathered",
    tile: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Every pair as a decision of its own.

    Args:
        rows: as for :func:`info_nce`.
        columns: as for :func:`info_nce`.
        scale: [1].
        bias: [1], added to every logit.
        share: how columns reach the other ranks.
        tile: rows and columns of a tile; left out: by the device.
        reduction: "none" gives the part of each sample, whose mean is the loss.

    Returns:
        Scalar: the sum over all pairs of this rank's rows, over the number of rows; or float[n].
    """
    rows, columns, scale, bias = _exact(rows), _exact(columns), _exact(scale), _exact(bias)
    sums, _ = _OverAllPairs.apply(rows, columns, scale, bias, _Pairs("sigmoid", share, tile=tile))
    return _reduced(sums, reduction)


def nt_xent(
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    *,
    share: Columns = "gathered",
    tile: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy: each view finds the other among both views of all samples.

    Args:
        first: unit vectors [n,D] of this rank's samples.
        second: the same of their second views.
        scale: [1], the inverse temperature.
        share: how columns reach the other ranks.
        tile: rows and columns of a tile; left out: by the device.
        reduction: "none" gives the part of each sample, whose mean is the loss.

    Returns:
        Scalar, the mean over this rank's 2n views; or float[n], of both views of a sample.
    """
    first, second, scale = _exact(first), _exact(second), _exact(scale)
    views = torch.cat([first, second])
    pairs = _Pairs("softmax", share, skip_self=True, tile=tile)
    across, _ = _OverAllPairs.apply(views, views, scale, None, pairs)
    of_views = across.view(2, -1).mean(dim=0)
    return _reduced(of_views - _positives(first, second, scale), reduction)


def in_batch_nce(
    rows: Tensor, keys: Tensor, scale: Tensor, *, tile: int | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Each row finds its key among those of the global batch. Keys get no gradient.

    Args:
        rows: unit vectors [n,D].
        keys: unit vectors [n,D].
        scale: [1].
        tile: rows and columns of a tile; left out: by the device.
        reduction: "none" gives the part of each sample, whose mean is the loss.

    Returns:
        Scalar, the mean over this rank's rows; or float[n].
    """
    rows, keys, scale = _exact(rows), _exact(keys).detach(), _exact(scale)
    across, _ = _OverAllPairs.apply(rows, keys, scale, None, _Pairs("softmax", tile=tile))
    return _reduced(across - _positives(rows, keys, scale), reduction)


def queue_nce(
    rows: Tensor,
    keys: Tensor,
    queue: Tensor,
    scale: Tensor,
    *,
    tile: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Each row finds its own key among the queue's, which every rank holds whole. Keys and queue get no gradient.

    Args:
        rows: unit vectors [n,D].
        keys: unit vectors [n,D].
        queue: unit vectors [K,D], the same on every rank.
        scale: [1].
        tile: rows and columns of a tile; left out: by the device.
        reduction: "none" gives the part of each sample, whose mean is the loss.

    Returns:
        Scalar, the mean over this rank's rows; or float[n].
    """
    rows, keys, scale = _exact(rows), _exact(keys).detach(), _exact(scale)
    pairs = _Pairs("softmax", "here", tile=tile)
    others, _ = _OverAllPairs.apply(rows, _exact(queue).detach(), scale, None, pairs)
    positive = _positives(rows, keys, scale)
    return _reduced(torch.logaddexp(positive, others) - positive, reduction)


def traffic_bytes(rows: int, width: int, world: int, *, both: bool, element: int = 4) -> int:
    """Bytes that each rank receives in one forward and backward of a gathered loss with gradient to both sides.

    Columns come in (all-gather) and their gradients go home (reduce-scatter): 2 (W - 1) n D elements. With ``both``,
    the columns' log-sum-exps are merged (two all-reduces of W n numbers, at 2 (W - 1) / W each) and their upstream
    gradients gathered: 5 (W - 1) n more. Gathering both sides with gradient costs 4 (W - 1) n D.
    """
    return (world - 1) * rows * (2 * width + (5 if both else 0)) * element
