"""The convolutional autoencoder of latent diffusion models: images to a map of codes, and back.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022, arXiv 2112.10752), appendix
E.1, after VQGAN (Esser et al. 2021, 2012.09841). Parts are named as diffusers names them, so that what is trained here
is read there, and the other way round.
Shape letters: B samples, C channels, H height, W width, Z channels of the code, h and w its height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.convolution import Conv
from pipeline.nn.encoder import to_weights
from pipeline.nn.unet import Norm, attend

EPSILON = 1e-6
"""Of the norms."""


class AutoencoderConfig(Strict):
    """Settings; the defaults are those of the published autoencoders with f = 8."""

    channels: Annotated[int, Field(ge=1)] = 128
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 4)
    """Of the channels, at each size; every size is half the one before."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks at each size in the encoder; one more in the decoder."""
    groups: Annotated[int, Field(ge=1)] = 32
    """Of the norms; divides the channels of each size."""
    attention: bool = True
    """At the smallest size."""
    latent: Annotated[int, Field(ge=1)] = 4
    """Z."""

    @model_validator(mode="after")
    def _groups_divide(self) -> AutoencoderConfig:
        for multiplier in self.multipliers:
            if (width := self.channels * multiplier) % self.groups:
                raise ValueError(f"groups = {self.groups} does not divide the {width} channels of a size; change one")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each size, the largest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """h and w of the code.

        Raises:
            ConfigError: the image cannot be halved so often.
        """
        factor = 2 ** (len(self.multipliers) - 1)
        if any(size % factor for size in image_size):
            raise ConfigError(
                f"network.multipliers has {len(self.multipliers)} sizes, each half the one before, so that images must "
                f"be multiples of {factor} pixels; they are {image_size[0]}x{image_size[1]}"
            )
        return image_size[0] // factor, image_size[1] // factor


class Block(nn.Module):
    """norm, SiLU, convolution, twice; around them a shortcut."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(channels, groups, EPSILON), Norm(out, groups, EPSILON)
        self.conv1, self.conv2 = Conv(channels, out, 3), Conv(out, out, 3)
        self.conv_shortcut = Conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,out,H,W]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class Attention(nn.Module):
    """One head over all places, with a norm before and around it a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = Norm(channels, groups, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    """A block, attention where there is any, a block."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Block(channels, channels, config.groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, config.groups)] if config.attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class Halve(nn.Module):
    """A convolution at every second place, which looks to the right and down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2)
        self.conv.padding = 0

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C,H/2,W/2]."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Twice(nn.Module):
    """Every place four times, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C,2H,2W]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Size(nn.Module):
    """The blocks of one size, and what leads to the next."""

    def __init__(self, widths: list[int], groups: int, end: nn.Module | None, end_name: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Block(a, b, groups) for a, b in pairwise(widths)])
        self.end_name = end_name
        if end is not None:
            self.add_module(end_name, nn.ModuleList([end]))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to the next size."""
        for block in self.resnets:
            x = block(x)
        ends: Any = getattr(self, self.end_name, ())
        for end in ends:
            x = end(x)
        return x


class Encoder(nn.Module):
    """Images to a map.

    Args:
        config: sizes.
        channels: C of the images.
        out: channels of the map.
    """

    def __init__(self, config: AutoencoderConfig, channels: int, out: int) -> None:
        super().__init__()
        widths, n = config.widths, config.blocks
        self.conv_in = Conv(channels, widths[0], 3)
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            [
                Size([a, *[b] * n], config.groups, Halve(b) if i < len(widths) - 1 else None, "downsamplers")
                for i, (a, b) in enumerate(zip(before, widths, strict=True))
            ]
        )
        self.mid_block = Middle(widths[-1], config)
        self.conv_norm_out = Norm(widths[-1], config.groups, EPSILON)
        self.conv_out = Conv(widths[-1], out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """float[B,C,H,W] to [B,out,h,w]."""
        x = self.conv_in(x)
        for size in self.down_blocks:
            x = size(x)
        return self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """A map of codes to images.

    Args:
        config: sizes.
        out: channels of the images, or of what they are distributed by.
    """

    def __init__(self, config: AutoencoderConfig, out: int) -> None:
        super().__init__()
        widths, n = config.widths[::-1], config.blocks + 1
        self.conv_in = Conv(config.latent, widths[0], 3)
        self.mid_block = Middle(widths[0], config)
        before = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            [
                Size([a, *[b] * n], config.groups, Twice(b) if i < len(widths) - 1 else None, "upsamplers")
                for i, (a, b) in enumerate(zip(before, widths, strict=True))
            ]
        )
        self.conv_norm_out = Norm(widths[-1], config.groups, EPSILON)
        self.conv_out = Conv(widths[-1], out, 3)

    def forward(self, z: Tensor) -> Tensor:
        """float[B,Z,h,w] to [B,out,H,W]."""
        x = self.mid_block(self.conv_in(z))
        for size in self.up_blocks:
            x = size(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder, decoder, and a product with a matrix at each place on both sides of the code.

    Args:
        config: sizes.
        channels: C of the images.
        coded: channels that the encoder gives at each place: Z, or 2 Z for means and variances.
    """

    def __init__(self, config: AutoencoderConfig, channels: int, coded: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, channels, coded)
        self.decoder = Decoder(config, channels)
        self.quant_conv, self.post_quant_conv = Conv(coded, coded, 1), Conv(config.latent, config.latent, 1)

    def encode(self, x: Tensor) -> Tensor:
        """float[B,C,H,W] to at least float32[B,coded,h,w]."""
        h = self.quant_conv(self.encoder(to_weights(x, self)))
        return h.to(torch.promote_types(h.dtype, torch.float32))

    def decode(self, z: Tensor) -> Tensor:
        """[B,Z,h,w] to at least float32[B,C,H,W]."""
        x = self.decoder(self.post_quant_conv(to_weights(z, self)))
        return x.to(torch.promote_types(x.dtype, torch.float32))


def to_diffusers(model: Autoencoder) -> dict[str, Tensor]:
    """Its weights as ``diffusers.AutoencoderKL`` and ``VQModel`` name and lay them out."""
    return {
        name: value.permute(0, 3, 1, 2).contiguous() if value.ndim == 4 else value
        for name, value in model.state_dict().items()
    }


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    return {name: v.permute(0, 2, 3, 1).contiguous() if v.ndim == 4 else v for name, v in weights.items()}


def diffusers_settings(config: AutoencoderConfig, channels: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """What both classes of diffusers are told."""
    sizes = len(config.multipliers)
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * sizes,
        "up_block_types": ["UpDecoderBlock2D"] * sizes,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.attention,
        "sample_size": image_size[0],
    }
