"""Layers that begin by saying nothing."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from pipeline.nn.convolution import Conv

Layer = TypeVar("Layer", nn.Linear, Conv)


def zeroed(layer: Layer) -> Layer:
    """``layer`` with all its weights set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
