"""Networks that make images of noise, optionally of a class: SNGAN's ResNet, and the convolutions of DCGAN.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018, arXiv 1802.05957), tables 3 and
4, with their initial weights; classes by the norms' scales and shifts: Miyato and Koyama (ICLR 2018, 1802.05637).
Shape letters: B samples, C channels, H height, W width, Z latent numbers.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive, Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.nn.convolution import Conv
from pipeline.nn.encoder import to_weights
from pipeline.nn.unet import Norm

NORMAL = 0.02
"""Standard deviation of DCGAN's initial weights."""


class GeneratorConfig(Strict):
    """Settings; the defaults are SNGAN's for 32 pixels."""

    name: Literal["resnet", "dcgan"] = "resnet"
    latent: Positive = 128
    """Z."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=2)] = (256, 256, 256, 256)
    """Channels at each size, the smallest first; every size is twice the one before."""
    norm: Literal["batch", "group"] = "batch"
    """Batch norm has the statistics of a micro-batch over all ranks; group norm needs no other samples."""

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the smallest size.

        Raises:
            ConfigError: the image cannot be halved so often.
        """
        factor = 2 ** (len(self.widths) - 1)
        if any(size % factor for size in image_size):
            raise ConfigError(
                f"generator.widths has {len(self.widths)} sizes, each twice the one before, so that images must be "
                f"multiples of {factor} pixels; they are {image_size[0]}x{image_size[1]}"
            )
        return image_size[0] // factor, image_size[1] // factor


def xavier(layer: Conv | nn.Linear, gain: float = 1.0) -> Conv | nn.Linear:
    """``layer`` with Glorot's uniform weights times ``gain``, and no bias: the SNGAN authors' start."""
    weight = layer.weight.data
    nn.init.xavier_uniform_(weight.permute(0, 3, 1, 2) if weight.ndim == 4 else weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ClassNorm(nn.Module):
    """A norm whose scale and shift belong to the class, where there are any.

    Args:
        channels: C.
        kind: of norm.
        classes: 0: scale and shift are one for all.
    """

    def __init__(self, channels: int, kind: Literal["batch", "group"], classes: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(nn.BatchNorm2d(channels)) if kind == "batch" else Norm(channels)
        self.scale = self.shift = None
        if classes:
            self.norm.weight.requires_grad_(False)
            self.norm.bias.requires_grad_(False)
            self.scale, self.shift = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        """[B,C,H,W] to the same."""
        x = self.norm(x)
        if self.scale is None or self.shift is None:
            return x
        return x * self.scale(label)[:, :, None, None].to(x.dtype) + self.shift(label)[:, :, None, None].to(x.dtype)


class _UpBlock(nn.Module):
    """norm, ReLU, twice the size, convolution, norm, ReLU, convolution; around them a convolution of one pixel."""

    def __init__(self, channels: int, out: int, norm: Literal["batch", "group"], classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ClassNorm(channels, norm, classes), ClassNorm(out, norm, classes)
        self.conv1 = xavier(Conv(channels, out, 3), math.sqrt(2))
        self.conv2 = xavier(Conv(out, out, 3), math.sqrt(2))
        self.shortcut = xavier(Conv(channels, out, 1))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        """[B,C,H,W] to [B,out,2H,2W]."""
        h = self.conv1(_twice(functional.relu(self.norm1(x, label))))
        h = self.conv2(functional.relu(self.norm2(h, label)))
        return h + _twice(self.shortcut(x))


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0)


class _UpLayer(nn.Module):
    """A transposed convolution, norm, ReLU."""

    def __init__(self, channels: int, out: int, norm: Literal["batch", "group"], classes: int) -> None:
        super().__init__()
        self.conv = _normal(nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1))
        self.norm = ClassNorm(out, norm, classes)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        """[B,C,H,W] to [B,out,2H,2W]."""
        return functional.relu(self.norm(self.conv(x), label))


def _normal(layer: nn.Linear | nn.ConvTranspose2d | Conv) -> nn.Module:
    nn.init.normal_(layer.weight, std=NORMAL)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Generator(nn.Module):
    """The network.

    Args:
        config: settings.
        image_size: height and width.
        channels: C of the images.
        classes: that it is told; 0: none.

    Raises:
        ConfigError: an image size that cannot be halved so often.
    """

    def __init__(self, config: GeneratorConfig, image_size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.start = (config.widths[0], *config.grid(image_size))
        resnet = config.name == "resnet"
        start, block = (xavier, _UpBlock) if resnet else (_normal, _UpLayer)
        self.linear = start(nn.Linear(config.latent, math.prod(self.start)))
        self.norm_in = None if resnet else ClassNorm(config.widths[0], config.norm, classes)
        self.blocks = nn.ModuleList([block(a, b, config.norm, classes) for a, b in pairwise(config.widths)])
        self.norm_out = ClassNorm(config.widths[-1], config.norm, classes) if resnet else None
        self.conv = start(Conv(config.widths[-1], channels, 3))

    def forward(self, z: Tensor, label: Tensor | None) -> Tensor:
        """float[B,Z], and int64[B] where there are classes, to at least float32[B,C,H,W] from -1 to 1."""
        x = self.linear(to_weights(z, self)).view(-1, *self.start)
        if self.norm_in is not None:
            x = functional.relu(self.norm_in(x, label))
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, label)
        if self.norm_out is not None:
            x = functional.relu(self.norm_out(x, label))
        x = self.conv(x)
        return torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)))
