"""The U-Net of the diffusion models: residual blocks told the time, self-attention at chosen sizes, skip connections.

Ho et al. 2020 (arXiv 2006.11239), appendix B; with scale-shift conditioning and residual resampling as in ADM
(Dhariwal and Nichol 2021, 2105.05233, section 3); with cross-attention on text as in Rombach et al. 2022 (2112.10752).
The last layer of each block and of the network begins at zero, norms are computed in fp32.
Shape letters: B samples, C channels, H height, W width, E embedding, L tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.conditioning import Conditions, Embedding, TimeEmbedding, Told
from pipeline.nn.convolution import Conv
from pipeline.nn.dropout import SampleDropout
from pipeline.nn.zero import zeroed


class UNetConfig(Strict):
    """Settings of the U-Net; the defaults are those of Ho et al. for CIFAR-10, 35.7M parameters."""

    name: Literal["unet"] = "unet"
    channels: Annotated[int, Field(ge=4, multiple_of=4)] = 128
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 2, 2)
    """Of the channels, at each size; every size is half the one before."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks at each size on the way down; one more on the way up."""
    attention: tuple[Annotated[int, Field(ge=1)], ...] = (16,)
    """Heights of the feature maps at which there is attention; in the middle there always is."""
    head_dim: Annotated[int, Field(ge=1)] | None = None
    """Channels of an attention head; left out: one head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale_shift: bool = False
    """Time and class scale and shift the second norm of a block, instead of being added before it."""
    resample: Literal["conv", "residual"] = "conv"
    """Between sizes: a strided convolution, or a residual block that resamples."""
    embedding: TimeEmbedding = "sinusoidal"


class Norm(nn.GroupNorm):
    """Group norm in fp32 whatever the input: CPU autocast would compute it in bf16.

    Args:
        channels: C.
        groups: that the channels are divided into; left out: at most 32, of at least four channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5) -> None:
        fitting = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
        super().__init__(groups or fitting, channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and type."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        # A GPU's kernel wants channels first, the convolutions around it want them last: with the change of type there
        # and back, the change of layout costs no pass over memory of its own.
        there, back = torch.preserve_format, torch.preserve_format
        if input.is_cuda:
            there, back = torch.contiguous_format, torch.channels_last
        with torch.autocast(input.device.type, enabled=False):
            wide = input.to(dtype, memory_format=there)
            normed = functional.group_norm(wide, self.num_groups, weight, bias, self.eps)
        return normed.to(input.dtype, memory_format=back)


class ResBlock(nn.Module):
    """norm, SiLU, convolution; time and class; norm, SiLU, dropout, convolution from zero; around it a shortcut."""

    def __init__(self, channels: int, out: int, width: int, config: UNetConfig, name: str, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.scale_shift = scale, config.scale_shift
        self.norm1, self.norm2 = Norm(channels), Norm(out)
        self.conv1 = Conv(channels, out, 3)
        self.told = nn.Linear(width, 2 * out if config.scale_shift else out)
        self.dropout = SampleDropout(config.dropout, f"unet.{name}")
        self.conv2 = zeroed(Conv(out, out, 3))
        self.shortcut = Conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B,C,H,W] to [B,out,H*scale,W*scale]; ``embedding`` [B,E] has been through SiLU."""
        h = self.conv1(self._resampled(functional.silu(self.norm1(x))))
        told = self.told(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        h = self.conv2(self.dropout(functional.silu(h)))
        return self.shortcut(self._resampled(x)) + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.scale == 1.0:
            return x
        return functional.avg_pool2d(x, 2) if self.scale < 1 else functional.interpolate(x, scale_factor=2.0)


class Attention(nn.Module):
    """Attention over places, and over tokens where there are any; each with a norm before and zeros at its end."""

    def __init__(self, channels: int, head_dim: int | None, token_width: int | None) -> None:
        super().__init__()
        if channels % (head_dim or channels):
            raise ConfigError(f"network.head_dim = {head_dim} does not divide {channels} channels; change one of them")
        self.heads = channels // (head_dim or channels)
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.across = None if token_width is None else _Across(channels, self.heads, token_width)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """[B,C,H,W] to the same."""
        h = self.qkv(self.norm(x).flatten(2).transpose(1, 2))
        q, key, value = h.chunk(3, dim=-1)
        x = x + self.out(attend(q, key, value, self.heads)).transpose(1, 2).reshape(x.shape)
        if self.across is not None:
            assert told.tokens is not None, "a network with text is given tokens"
            x = x + self.across(x, told.tokens, told.inside)
        return x


class _Across(nn.Module):
    """From places to tokens."""

    def __init__(self, channels: int, heads: int, token_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_tokens = Norm(channels), nn.LayerNorm(token_width)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(token_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, inside: Tensor | None) -> Tensor:
        q = self.q(self.norm(x).flatten(2).transpose(1, 2))
        key, value = self.kv(self.norm_tokens(tokens.to(self.kv.weight.dtype))).chunk(2, dim=-1)
        return self.out(attend(q, key, value, self.heads, inside)).transpose(1, 2).reshape(x.shape)


def attend(q: Tensor, key: Tensor, value: Tensor, heads: int, inside: Tensor | None = None) -> Tensor:
    """[B,N,C] and twice [B,L,C] to [B,N,C]; ``inside`` bool[B,L] says what may be looked at."""
    q, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, key, value))
    mask = None if inside is None else inside[:, None, None]
    return functional.scaled_dot_product_attention(q, key, value, mask).transpose(1, 2).flatten(2)


class Step(nn.Module):
    """A residual block, and attention at some sizes."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor, given: Conditions) -> Tensor:
        """[B,C,H,W] to [B,out,H,W]."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, given.told)


class Resample(nn.Module):
    """Half the size by a strided convolution, or twice by repeating pixels before one."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = Conv(channels, channels, 3, stride=1 if up else 2)

    def forward(self, x: Tensor, embedding: Tensor, given: Conditions) -> Tensor:
        """[B,C,H,W] to [B,C,H/2,W/2] or [B,C,2H,2W]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0) if self.up else x)


class UNet(nn.Module):
    """The network.

    Args:
        config: settings.
        image_size: height and width.
        channels: of the image.
        out: channels of the answer.
        classes: that it may be told; 0: none.
        token_width: D of text tokens that it is told; None: none.

    Raises:
        ConfigError: an image size that cannot be halved as often as needed, or attention at a size that there is not.
    """

    def __init__(
        self,
        config: UNetConfig,
        image_size: tuple[int, int],
        *,
        channels: int,
        out: int,
        classes: int = 0,
        token_width: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(config, image_size)
        self.config, self.width, self.token_width = config, 4 * config.channels, token_width
        self.embedding = Embedding(config.embedding, config.channels, self.width, classes)
        self.conv_in = Conv(channels, config.channels, 3)
        now, skips = config.channels, [config.channels]
        widths: dict[str, int] = {}
        down, middle, up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for level, multiplier in enumerate(config.multipliers):
            for block in range(config.blocks):
                out_now, name = multiplier * config.channels, f"down_{level}_{block}"
                down[name] = self._step(name, now, out_now, image_size[0] >> level)
                now = widths[name] = out_now
                skips.append(now)
            if level < len(config.multipliers) - 1:
                down[f"down_{level}_half"] = self._resampling(f"down_{level}_half", now, 0.5)
                widths[f"down_{level}_half"] = now
                skips.append(now)
        lowest = image_size[0] >> (len(config.multipliers) - 1)
        middle["middle_0"] = self._step("middle_0", now, now, lowest, attention=True)
        middle["middle_1"] = self._step("middle_1", now, now, None)
        widths |= {"middle_0": now, "middle_1": now}
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for block in range(config.blocks + 1):
                out_now, name = multiplier * config.channels, f"up_{level}_{block}"
                up[name] = self._step(name, now + skips.pop(), out_now, image_size[0] >> level)
                now = widths[name] = out_now
            if level > 0:
                up[f"up_{level}_twice"] = self._resampling(f"up_{level}_twice", now, 2.0)
                widths[f"up_{level}_twice"] = now
        self.down, self.middle, self.up = down, middle, up
        self.taps = widths
        """Blocks, from the input on, and the channels that come out of each."""
        self.norm_out = Norm(now)
        self.conv_out = zeroed(Conv(now, out, 3))

    def _step(self, name: str, channels: int, out: int, height: int | None, attention: bool = False) -> Step:
        block = ResBlock(channels, out, self.width, self.config, name)
        wanted = attention or height in self.config.attention
        return Step(block, Attention(out, self.config.head_dim, self.token_width) if wanted else None)

    def _resampling(self, name: str, channels: int, scale: float) -> nn.Module:
        if self.config.resample == "conv":
            return Resample(channels, up=scale > 1)
        return Step(ResBlock(channels, channels, self.width, self.config, name, scale), None)

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order of their names in ``taps``."""
        return [*self.down.values(), *self.middle.values(), *self.up.values()]

    def walk(self, x: Tensor, given: Conditions) -> Iterator[tuple[str, Tensor]]:
        """Each block's name and what comes out of it, [B,C,H,W]."""
        x = x.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        embedding = functional.silu(self.embedding(given))
        h = self.conv_in(x)
        skips = [h]
        for name, step in self.down.items():
            h = step(h, embedding, given)
            skips.append(h)
            yield name, h
        for name, step in self.middle.items():
            h = step(h, embedding, given)
            yield name, h
        for name, step in self.up.items():
            h = step(h if name.endswith("twice") else torch.cat([h, skips.pop()], dim=1), embedding, given)
            yield name, h

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        """Noised images [B,C,H,W] to the answer, at least float32[B,out,H,W]."""
        h = x
        for _name, out in self.walk(x, given):
            h = out
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return h.to(torch.promote_types(h.dtype, torch.float32))


def _check_sizes(config: UNetConfig, image_size: tuple[int, int]) -> None:
    stride = 2 ** (len(config.multipliers) - 1)
    if image_size[0] % stride or image_size[1] % stride:
        raise ConfigError(
            f"images of {image_size[0]}x{image_size[1]} cannot be halved {len(config.multipliers) - 1} times; take "
            f"sizes that are multiples of {stride} (data.image.size), or fewer network.multipliers"
        )
    heights = [image_size[0] >> level for level in range(len(config.multipliers))]
    if strange := sorted(set(config.attention) - set(heights)):
        raise ConfigError(
            f"network.attention: there is no feature map of height {strange[0]}; "
            f"there are {', '.join(map(str, heights))}"
        )
