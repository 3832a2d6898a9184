"""The small networks between an encoder and a contrastive loss, and encoders for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.nn.batch_norm import GlobalBatchNorm


def projection(
    widths: Sequence[int], *, norm: bool, last: Literal["none", "scaled", "plain"] = "none"
) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: of the input, the hidden layers and the output.
        norm: batch norm over all ranks before each ReLU (and then no biases).
        last: batch norm at the end: none; with a scale and no centre (SimCLR); without either (MoCo v3).
    """
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        ending = index == len(widths) - 2
        layers.append(nn.Linear(before, after, bias=not norm))
        if norm and not ending:
            layers.append(GlobalBatchNorm(nn.BatchNorm1d(after)))
        if not ending:
            layers.append(nn.ReLU())
    if last != "none":
        layers.append(GlobalBatchNorm(nn.BatchNorm1d(widths[-1], affine=last == "scaled")))
        if last == "scaled":
            layers[-1].bias.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return nn.Sequential(*layers)


def hidden_layers(widths: Sequence[int], *, norm: bool) -> list[nn.Module]:
    """Linear layers each with a ReLU, and with ``norm`` batch norm over all ranks before it (and then no biases)."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(nn.Linear(before, after, bias=not norm))
        if norm:
            layers.append(GlobalBatchNorm(nn.BatchNorm1d(after)))
        layers.append(nn.ReLU())
    return layers


def small_stem(backbone: nn.Module, channels: int) -> None:
    """Give a timm ResNet the stem for images of 32 pixels: 3x3 without stride, no pooling (SimCLR, appendix B.9).

    Raises:
        ConfigError: it is no ResNet with a plain stem.
    """
    stem = getattr(backbone, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise ConfigError("objective.small_stem: only timm's ResNets with a single stem convolution have one")
    fresh = nn.Conv2d(channels, stem.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1, backbone.maxpool = fresh, nn.Identity()
