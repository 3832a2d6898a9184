"""Dropout and drop path whose random numbers belong to the sample.

torch's and timm's own draw from one generator in the order of the calls, so that what is dropped depends on how a
batch is cut into micro-batches and ranks. Here it is a function of (seed, epoch, sample, layer), like every other
random number of a run.

Shape letters: B samples, V views of each sample in one forward (rows of view 0 first).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, StepContext


class _Samples:
    """The keys of a batch's samples, drawn once for all layers: the generator's many small kernels are what costs."""

    def __init__(self, batch: Batch, ctx: StepContext, purpose: str) -> None:
        self._batch, self._ctx, self._purpose = batch, ctx, purpose
        self._keys: dict[int, Tensor] = {}

    def keys(self, rows: int) -> Tensor:
        """One per view of each sample: int32[V*B,1]."""
        if rows not in self._keys:
            views = rows // len(self._batch["id"])
            numbers = self._ctx.random(self._batch, self._purpose).integers(0, 2**31, views)
            self._keys[rows] = numbers.T.reshape(-1, 1).to(torch.int32)
        return self._keys[rows]


_samples: ContextVar[_Samples | None] = ContextVar("_samples", default=None)


@contextmanager
def dropping_for(batch: Batch, ctx: StepContext, purpose: str = "dropout") -> Iterator[None]:
    """Inside, every :class:`SampleDropout` that is in training drops for the samples of ``batch``.

    Another ``purpose`` drops otherwise: for a second forward of the same samples, as of another view.
    """
    token = _samples.set(_Samples(batch, ctx, purpose))
    try:
        yield
    finally:
        _samples.reset(token)


class SampleDropout(nn.Module):
    """Drops numbers, or with ``whole`` rows, and scales the rest up (Srivastava et al. 2014; Huang et al. 2016).

    The counter-based generator gives each view of a sample one key; key and layer, and then place, are mixed by the
    finaliser of MurmurHash3 (32 bit), in int32 arithmetic, which is a fraction of what the generator costs.

    Args:
        p: probability of being dropped.
        purpose: name of the layer.
        whole: drop path.
    """

    def __init__(self, p: float, purpose: str, whole: bool = False) -> None:
        super().__init__()
        self.p, self.whole = p, whole
        self._layer = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=4).digest(), "little", signed=True)
        self._last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[V*B,...] to the same shape."""
        if not self.training or self.p == 0:
            return x
        own: Tensor = self._keys(len(x))  # pyright: ignore  (torch's decorator may, to it, be called in two ways)
        keys = _mixed(own ^ self._layer)
        shape = (1,) * (x.ndim - 1) if self.whole else tuple(x.shape[1:])
        place = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=x.device)
        kept = _mixed(place ^ keys) >= int(self.p * 2**32) - 2**31
        return x * kept.view(-1, *shape).to(x.dtype).div_(1 - self.p)

    @torch.compiler.disable
    def _keys(self, rows: int) -> Tensor:
        """Of the samples of this forward; or of the last one, where its backward computes activations anew."""
        samples = _samples.get()
        if samples is not None:
            self._last = samples.keys(rows)
        assert self._last is not None and len(self._last) == rows, "dropout outside of `dropping_for`"
        return self._last


def _mixed(h: Tensor) -> Tensor:
    """Evenly spread int32, a function of each number of ``h``, in place."""
    for shift, mask, factor in ((16, 0xFFFF, -2048144789), (13, 0x7FFFF, -1028477387), (16, 0xFFFF, 1)):
        h ^= (h >> shift).bitwise_and_(mask)
        h *= factor
    return h


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
