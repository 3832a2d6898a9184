"""Batch norm over the batch of all ranks, on any backend.

``torch.nn.SyncBatchNorm`` has no CPU path, and timm's and torch's converters do not know each other's classes. Here
the statistics alone are exchanged (two vectors of the channels), with gradient, and the rest is torch's.

Shape letters: B samples, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.dist.collectives import all_reduce, mean_over_ranks, rank_and_world


class GlobalBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the micro-batches of all ranks together (equal in size).

    Made from another batch norm, whose parameters and buffers it shares. A subclass of timm may bring an activation
    and dropout along; they are kept.
    """

    def __init__(self, other: _BatchNorm) -> None:
        super().__init__(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        self.weight, self.bias = other.weight, other.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(other, name))
        self.drop, self.act = getattr(other, "drop", None), getattr(other, "act", None)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape [B,C,...]."""

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,...] to the same shape."""
        together = self.training and rank_and_world()[1] > 1
        x = self._normalized(input) if together else super().forward(input)
        for layer in (self.drop, self.act):
            x = x if layer is None else layer(x)
        return x

    def _normalized(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        axes = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = mean_over_ranks(wide.mean(axes))
        # Around the common mean: no difference of large squares.
        var = mean_over_ranks((wide - mean.view(shape)).square().mean(axes))
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean.detach(), var.detach(), wide.numel() // x.shape[1] * rank_and_world()[1])
        factor = (var + self.eps).rsqrt()
        if self.weight is not None:
            factor = factor * self.weight
        shift = -mean * factor if self.bias is None else self.bias - mean * factor
        return (wide * factor.view(shape) + shift.view(shape)).to(x.dtype)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """The running statistics, as torch keeps them: the variance unbiased."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var.dtype), weight)


def synchronise(module: nn.Module) -> nn.Module:
    """Put :class:`GlobalBatchNorm` in place of every batch norm inside ``module``, in place; names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            synchronise(child)
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training use the statistics of their batch but do not add them to the running ones."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Make the running statistics of batch norms that are not synchronised the same on all ranks: their mean."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    kept = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    if kept and rank_and_world()[1] > 1:
        flat = all_reduce(torch.cat(kept)) / rank_and_world()[1]
        for own, mean in zip(kept, flat.split([len(t) for t in kept]), strict=True):
            own.copy_(mean)
