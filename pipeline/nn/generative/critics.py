"""Networks that tell images from what generators make: SNGAN's ResNet and convolutions, and one that judges patches.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018, arXiv 1802.05957), tables 3 and
4, with their initial weights; classes by projection: Miyato and Koyama (ICLR 2018, 1802.05637), eq. 3; patches: Isola
et al. (CVPR 2017, 1611.07004), section 3.2, as VQGAN has it (Esser et al. 2021, 2012.09841).
Shape letters: B samples, C channels, H height, W width, P places that are judged, D features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive, Strict
from pipeline.core.errors import ConfigError
from pipeline.dist.collectives import wide
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.nn.convolution import Conv
from pipeline.nn.encoder import to_weights
from pipeline.nn.generative.generators import NORMAL, xavier
from pipeline.nn.generative.spectral import spectrally_normed

Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]


class ResNetCriticConfig(Strict):
    """Residual blocks; the defaults are SNGAN's for 32 pixels."""

    name: Literal["resnet"] = "resnet"
    widths: Widths = (128, 128, 128, 128)
    """Channels of each block."""
    halvings: Positive = 2
    """Blocks that halve the size, the first ones."""
    pool: Literal["sum", "mean"] = "sum"
    """Over the places of the last map; WGAN-GP's takes the mean."""
    spectral: bool = True
    """Divide weights by their largest singular value."""

    @model_validator(mode="after")
    def _enough_blocks(self) -> ResNetCriticConfig:
        if self.halvings > len(self.widths):
            raise ValueError(
                f"halvings = {self.halvings}: there are {len(self.widths)} blocks; give more widths, or fewer"
            )
        return self


class ConvCriticConfig(Strict):
    """Convolutions; the defaults are SNGAN's, after DCGAN's."""

    name: Literal["dcgan"] = "dcgan"
    widths: Widths = (64, 128, 256, 512)
    """Channels at each size; every size is half the one before."""
    spectral: bool = True


class PatchCriticConfig(Strict):
    """Convolutions whose answers are of overlapping patches; the defaults are VQGAN's."""

    name: Literal["patch"] = "patch"
    channels: Positive = 64
    layers: Positive = 3
    """That halve the size."""
    norm: bool = True
    """Batch norm over all ranks."""
    spectral: bool = False


CriticConfig = ResNetCriticConfig | ConvCriticConfig | PatchCriticConfig


class Judged(NamedTuple):
    """What a critic makes of images."""

    scores: Tensor
    """At least float32[B,P], larger for what looks like data."""
    maps: list[Tensor]
    """What each block gives, [B,C,H,W]."""


def pooled(maps: Sequence[Tensor]) -> Tensor:
    """Means over the places of [B,C,H,W] each, side by side: at least float32[B,D]."""
    return torch.cat([wide(m).mean(dim=(2, 3)) for m in maps], dim=1)


class Critic(nn.Module, ABC):
    """What critics have in common."""

    widths: tuple[int, ...]
    """Channels of the maps; D together."""

    def maps(self, x: Tensor) -> list[Tensor]:
        """What each block gives of images, float[B,C,H,W] from -1 to 1."""
        return list(self._walk(to_weights(x, self)))

    @abstractmethod
    def _walk(self, x: Tensor) -> Iterator[Tensor]: ...

    @abstractmethod
    def _scores(self, last: Tensor, label: Tensor | None) -> Tensor:
        """[B,P] of the last map."""

    def forward(self, x: Tensor, label: Tensor | None = None) -> Judged:
        """Scores of images, float[B,C,H,W] from -1 to 1; ``label``, int64[B], where it is told classes."""
        maps = self.maps(x)
        return Judged(wide(self._scores(maps[-1], label)), maps)


class CriticFeatures(nn.Module):
    """Images to the means of the maps of the critic's blocks, side by side: float32[B,D]. Shares the critic."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic, self.dim = critic, sum(critic.widths)

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to [B,D]."""
        return pooled(self.critic.maps(image.float() / 127.5 - 1))


class _DownBlock(nn.Module):
    """ReLU, convolution, twice, then perhaps half the size; around them a shortcut. The first block has no ReLU before.

    Args:
        channels: C.
        out: channels that come out.
        halve: the size.
        first: it is given images.
    """

    def __init__(self, channels: int, out: int, halve: bool, first: bool) -> None:
        super().__init__()
        hidden = out if first else channels
        self.halve, self.first = halve, first
        self.conv1 = xavier(Conv(channels, hidden, 3), math.sqrt(2))
        self.conv2 = xavier(Conv(hidden, out, 3), math.sqrt(2))
        self.shortcut = xavier(Conv(channels, out, 1)) if halve or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,out,H,W], or half that size."""
        h = self.conv1(x if self.first else functional.relu(x))
        h = self.conv2(functional.relu(h))
        # A convolution of one pixel and a mean may change places: the smaller map is convolved.
        return self._sized(h) + self.shortcut(self._sized(x))

    def _sized(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 2) if self.halve else x


class _Answer(nn.Module):
    """A linear layer, and the product with the class's vector where there are classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = xavier(nn.Linear(width, 1))
        self.label = nn.Embedding(classes, width) if classes else None
        if self.label is not None:
            nn.init.xavier_uniform_(self.label.weight)

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        """[B,width] to [B,1]."""
        score = self.linear(h)
        return score if self.label is None else score + (self.label(label) * h).sum(dim=1, keepdim=True)


class ResNetCritic(Critic):
    """See :class:`ResNetCriticConfig`."""

    def __init__(self, config: ResNetCriticConfig, image_size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        _check_halvings(image_size, config.halvings, "critic.halvings")
        self.pool = config.pool
        self.blocks = nn.ModuleList(
            [
                _DownBlock(a, b, halve=i < config.halvings, first=i == 0)
                for i, (a, b) in enumerate(pairwise((channels, *config.widths)))
            ]
        )
        self.answer = _Answer(config.widths[-1], classes)
        self.widths = config.widths
        if config.spectral:
            spectrally_normed(self)

    def _walk(self, x: Tensor) -> Iterator[Tensor]:
        for block in self.blocks:
            x = block(x)
            yield functional.relu(x)

    def _scores(self, last: Tensor, label: Tensor | None) -> Tensor:
        return self.answer(last.sum(dim=(2, 3)) if self.pool == "sum" else last.mean(dim=(2, 3)), label)


class ConvCritic(Critic):
    """See :class:`ConvCriticConfig`."""

    def __init__(self, config: ConvCriticConfig, image_size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        factor = _check_halvings(image_size, len(config.widths) - 1, "critic.widths")
        self.same = nn.ModuleList([_normal(a, b, 3) for a, b in pairwise((channels, *config.widths))])
        self.halve = nn.ModuleList([_normal(width, width, 4, 2) for width in config.widths[:-1]])
        last = config.widths[-1] * (image_size[0] // factor) * (image_size[1] // factor)
        self.answer = _Answer(last, classes)
        nn.init.normal_(self.answer.linear.weight, std=NORMAL)
        for layer in (*self.same, *self.halve):
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        self.widths = config.widths
        if config.spectral:
            spectrally_normed(self)

    def _walk(self, x: Tensor) -> Iterator[Tensor]:
        for number, same in enumerate(self.same):
            x = functional.leaky_relu(same(x), 0.1)
            yield x
            if number < len(self.halve):
                x = functional.leaky_relu(self.halve[number](x), 0.1)

    def _scores(self, last: Tensor, label: Tensor | None) -> Tensor:
        return self.answer(last.flatten(1), label)


class PatchCritic(Critic):
    """See :class:`PatchCriticConfig`; it is told no classes."""

    def __init__(self, config: PatchCriticConfig, image_size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        if min(image_size) // 2**config.layers < 3:
            raise ConfigError(
                f"critic.layers = {config.layers}: images of {image_size[0]}x{image_size[1]} halved so often leave no "
                f"place for the last kernels of 4; take fewer, or images of at least {3 * 2**config.layers}"
            )
        if classes:
            raise ConfigError('a critic of patches is told no classes; set critic.name = "resnet"')
        self.widths = tuple(config.channels * min(2**i, 8) for i in range(config.layers + 1))
        self.layers = nn.ModuleList()
        for number, (a, b) in enumerate(pairwise((channels, *self.widths))):
            normed = config.norm and number > 0
            layer: list[nn.Module] = [_normal(a, b, 4, 2 if number < config.layers else 1, bias=not normed)]
            if normed:
                norm = nn.BatchNorm2d(b)
                nn.init.normal_(norm.weight, 1.0, NORMAL)
                layer.append(GlobalBatchNorm(norm))
            self.layers.append(nn.Sequential(*layer))
        self.answer = _normal(self.widths[-1], 1, 4)
        if config.spectral:
            spectrally_normed(self)

    def _walk(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), 0.2)
            yield x

    def _scores(self, last: Tensor, label: Tensor | None) -> Tensor:
        return self.answer(last).flatten(1)


def critic_of(config: CriticConfig, image_size: tuple[int, int], channels: int, classes: int = 0) -> Critic:
    """The network of a configuration; ``channels`` are the images'.

    Raises:
        ConfigError: images that do not fit.
    """
    if isinstance(config, ResNetCriticConfig):
        return ResNetCritic(config, image_size, channels, classes)
    if isinstance(config, ConvCriticConfig):
        return ConvCritic(config, image_size, channels, classes)
    return PatchCritic(config, image_size, channels, classes)


def _normal(channels: int, out: int, kernel: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution with DCGAN's initial weights; kernels of four keep, or halve, even sizes."""
    layer = nn.Conv2d(channels, out, kernel, stride, padding=1, bias=bias)
    nn.init.normal_(layer.weight, std=NORMAL)
    return layer


def _check_halvings(image_size: tuple[int, int], halvings: int, setting: str) -> int:
    factor = 2**halvings
    if any(size % factor for size in image_size):
        raise ConfigError(
            f"{setting}: the critic halves images {halvings} times, so that they must be multiples of {factor} pixels; "
            f"they are {image_size[0]}x{image_size[1]}"
        )
    return factor
