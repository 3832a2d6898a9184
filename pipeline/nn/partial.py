"""Partial fine-tuning: the last layers of an encoder are trained, and what is not stays in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.core.errors import ConfigError


def train_last(module: nn.Module, layers: Sequence[Sequence[str]], count: int) -> None:
    """Let the last ``count`` layers be trained, and whatever comes after them; nothing else.

    Args:
        module: whose parameters they are.
        layers: full names of parameters, or what they begin with in whole parts, layer by layer from the input.
        count: of layers.

    Raises:
        ConfigError: there are fewer.
    """
    if count > len(layers):
        raise ConfigError(f"{count} layers are to be trained, and the encoder has {len(layers)} that are known")
    resting = {name for layer in layers[: len(layers) - count] for name in layer}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_(resting.isdisjoint(".".join(parts[:depth]) for depth in range(1, len(parts) + 1)))


def rest(module: nn.Module) -> None:
    """Put every module in eval mode whose parameters are all frozen: no dropout, no change of statistics."""
    for inner in module.modules():
        parameters = list(inner.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            inner.eval()
