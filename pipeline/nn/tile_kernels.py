"""What happens to the entries of a tile of logits, between the matrix products.

Run one after another, these operations read and write a tile some thirty times in a forward and backward, which on an
accelerator takes half as long again as the products in fp32. Above :data:`FUSE_FROM` pairs they are therefore compiled
(torch.compile, so Triton and a C compiler are needed), which leaves a few passes; below, compiling would take longer
than it ever saves. Both give the same numbers to rounding. Shape letters: n rows, m columns of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FUSE_FROM = 2**30
"""Pairs of a rank (its rows times all columns) from which an accelerator runs compiled kernels."""


def add_exp(logits: Tensor, largest: Tensor, total: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Take a tile into running maxima and sums of exp(x - maximum) along ``dim``; gives both anew."""
    after = torch.maximum(largest, logits.amax(dim))
    # A place that has seen nothing but -inf keeps a finite reference, since inf - inf is no number.
    safe = after.where(after > -torch.inf, 0)
    return after, total * (largest - safe).exp() + (logits - safe.unsqueeze(dim)).exp_().sum(dim)


def softplus_sum(logits: Tensor) -> Tensor:
    """Sums of log(1 + exp(x)) over each row, float[n]."""
    return functional.softplus(logits).sum(dim=1)


def softmax_gradient(
    logits: Tensor, row: Tensor, upstream: Tensor, column: Tensor | None, upstream_column: Tensor | None
) -> Tensor:
    """exp(x - row) * upstream, and the same of columns added where they count: in place of the logits.

    ``row`` and ``column`` are log-sum-exps, float[n] and float[m]; upstream gradients are of the same shapes.
    """
    down = None if column is None else (logits - column).exp_()
    p = logits.sub_(row[:, None]).exp_().mul_(upstream[:, None])
    return p if down is None or upstream_column is None else p.addcmul_(down, upstream_column.expand_as(down))


def sigmoid_gradient(logits: Tensor, upstream: Tensor) -> Tensor:
    """The derivative of :func:`softplus_sum` times the rows' ``upstream``, float[n], in place of the logits."""
    return logits.sigmoid_().mul_(upstream[:, None])


class Kernels(NamedTuple):
    """The functions above, plain or compiled."""

    add_exp: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    softplus_sum: Callable[[Tensor], Tensor]
    softmax_gradient: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    sigmoid_gradient: Callable[[Tensor, Tensor], Tensor]


PLAIN = Kernels(add_exp, softplus_sum, softmax_gradient, sigmoid_gradient)


@functools.cache
def compiled() -> Kernels:
    """Compiled for tiles of any size; each is compiled when it is first called."""
    build = functools.partial(torch.compile, dynamic=True, fullgraph=True)
    return Kernels(build(add_exp), build(softplus_sum), build(softmax_gradient), build(sigmoid_gradient))


def kernels_for(device: torch.device, pairs: int) -> Kernels:
    """What so many pairs of a rank are worth on this device."""
    return compiled() if device.type == "cuda" and pairs >= FUSE_FROM else PLAIN
