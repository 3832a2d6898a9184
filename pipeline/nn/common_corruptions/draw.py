"""Chance that belongs to the sample, as corruptions use it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional


class Draw(Protocol):
    """Numbers for the B samples of a batch; :class:`pipeline.core.random.SampleRandom` is one."""

    def uniform(self, *shape: int) -> Tensor:
        """float32[B,*shape] in [0, 1)."""
        ...

    def normal(self, *shape: int) -> Tensor:
        """float32[B,*shape], standard normal."""
        ...

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64[B,*shape] in [low, high)."""
        ...


def between(draw: Draw, low: float, high: float, *shape: int) -> Tensor:
    """Uniform numbers of [low, high), float32[B,*shape]."""
    return low + (high - low) * draw.uniform(*shape)


SIDE = 224
"""Pixels of the images that the constants were made for."""


def scale_of(x: Tensor) -> float:
    """How much longer lengths are than at 224 pixels; by the shorter side."""
    return min(x.shape[-2:]) / SIDE


def canvas(x: Tensor) -> tuple[int, int]:
    """Height and width of the same images with a shorter side of 224: there is drawn what lies over an image."""
    height, width = (round(side / scale_of(x)) for side in x.shape[-2:])
    return height, width


def fitted(layer: Tensor, x: Tensor) -> Tensor:
    """What was drawn on the canvas [B,C,...], resized to images [B,C,H,W] if their size is another."""
    if layer.shape[-2:] == x.shape[-2:]:
        return layer
    return functional.interpolate(layer, x.shape[-2:], mode="bilinear", antialias=True)
