"""Dropout and drop path whose random numbers belong to the sample.

torch's and timm's own draw from one generator in the order of the calls, so that what is dropped depends on how a
batch is cut into micro-batches and ranks. Here it is a function of (seed, epoch, sample, layer), like every other
random number of a run.

Shape letters: B samples, V views of each sample in one forward (rows of view 0 first).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, StepContext

_samples: ContextVar[tuple[Batch, StepContext]] = ContextVar("_samples")


@contextmanager
def dropping_for(batch: Batch, ctx: StepContext) -> Iterator[None]:
    """Inside, the layers of :func:`drop_per_sample` drop for the samples of ``batch``."""
    token = _samples.set((batch, ctx))
    try:
        yield
    finally:
        _samples.reset(token)


class SampleDropout(nn.Module):
    """Drops numbers, or with ``whole`` rows, and scales the rest up (Srivastava et al. 2014; Huang et al. 2016).

    Args:
        p: probability of being dropped.
        purpose: name of the layer.
        whole: drop path.
    """

    def __init__(self, p: float, purpose: str, whole: bool) -> None:
        super().__init__()
        self.p, self.purpose, self.whole = p, purpose, whole

    def forward(self, x: Tensor) -> Tensor:
        """[V*B,...] to the same shape."""
        if not self.training:
            return x
        batch, ctx = _samples.get()
        shape = (1,) * (x.ndim - 1) if self.whole else tuple(x.shape[1:])
        views = range(len(x) // len(batch["id"]))
        drawn = torch.cat([ctx.random(batch, f"{self.purpose}.{view}").uniform(*shape) for view in views])
        return x * (drawn >= self.p).to(x.dtype).div_(1 - self.p)


def drop_per_sample(module: nn.Module, name: str) -> None:
    """Replace, in place, every dropout and drop path inside ``module``.

    Args:
        module: a timm model, say.
        name: of the module, the first part of its layers' purposes.

    Raises:
        ConfigError: attention weights are dropped, inside a fused kernel with a generator of its own.
    """
    for path, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Dropout | DropPath):
            continue
        p = layer.p if isinstance(layer, nn.Dropout) else layer.drop_prob
        parent, _, own = path.rpartition(".")
        if not p:
            continue
        if own == "attn_drop":
            raise ConfigError(
                "encoder_args.attn_drop_rate: attention dropout draws inside a kernel and would make results "
                "depend on the micro-batch; use proj_drop_rate or drop_path_rate"
            )
        setattr(module.get_submodule(parent), own, SampleDropout(p, f"{name}.{path}", isinstance(layer, DropPath)))
