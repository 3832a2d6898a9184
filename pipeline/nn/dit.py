"""A transformer that denoises: patches, adaptive layer norm told the time and class, timm's attention and MLP.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), https://arxiv.org/abs/2212.09748, the
"adaLN-Zero" variant: every block begins as the identity. Written from the paper.
Shape letters: B samples, C channels, H height, W width, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.conditioning import Conditions, Embedding, TimeEmbedding
from pipeline.nn.dropout import SampleDropout
from pipeline.nn.images import patchify, unpatchify
from pipeline.nn.positions import sincos_2d
from pipeline.nn.zero import zeroed

FREQUENCIES = 256
"""Sines and cosines of the time."""


class DiTConfig(Strict):
    """Settings of the transformer; the defaults are DiT-B/4, for images of 64 pixels."""

    name: Literal["dit"]
    patch: Annotated[int, Field(ge=1)] = 4
    dim: Annotated[int, Field(ge=4, multiple_of=4)] = 768
    depth: Annotated[int, Field(ge=1)] = 12
    heads: Annotated[int, Field(ge=1)] = 12
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """After the attention and the MLP of each block."""
    embedding: TimeEmbedding = "sinusoidal"

    @model_validator(mode="after")
    def _heads(self) -> DiTConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B,N,D] scaled and shifted by [B,D] each."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Norm(nn.LayerNorm):
    """Layer norm without weights, in fp32 whatever the input."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, elementwise_affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and type."""
        with torch.autocast(input.device.type, enabled=False):
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            return super().forward(wide).to(input.dtype)


class Block(nn.Module):
    """Attention and MLP, each with a norm that time and class modulate, and a gate that begins closed."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(config.dim), Norm(config.dim)
        self.attention = Attention(config.dim, num_heads=config.heads, qkv_bias=True)
        self.mlp = Mlp(config.dim, 4 * config.dim, act_layer=partial(nn.GELU, approximate="tanh"))  # pyright: ignore[reportArgumentType]
        self.modulation = zeroed(nn.Linear(config.dim, 6 * config.dim))
        self.dropout1, self.dropout2 = (SampleDropout(config.dropout, f"dit.{index}.{i}") for i in range(2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B,N,D] to the same; ``embedding`` [B,D] has been through SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, dim=1)
        h = self.dropout1(self.attention(modulate(self.norm1(x), shift1, scale1)))
        x = x + gate1[:, None] * h
        h = self.dropout2(self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x + gate2[:, None] * h


class DiT(nn.Module):
    """The network.

    Args:
        config: settings.
        image_size: height and width.
        channels: of the image.
        out: channels of the answer.
        classes: that it may be told; 0: none.

    Raises:
        ConfigError: an image size that the patches do not divide.
    """

    positions: Tensor

    def __init__(
        self, config: DiTConfig, image_size: tuple[int, int], *, channels: int, out: int, classes: int = 0
    ) -> None:
        super().__init__()
        if image_size[0] % config.patch or image_size[1] % config.patch:
            raise ConfigError(
                f"images of {image_size[0]}x{image_size[1]} cannot be cut into patches of {config.patch}; take sizes "
                f"that are multiples of {config.patch} (data.image.size), or another network.patch"
            )
        self.patch = (config.patch, config.patch)
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.taps = {f"block_{i}": config.dim for i in range(config.depth)}
        """Blocks, from the input on, and the width of what comes out of each."""
        self.embedding = Embedding(config.embedding, FREQUENCIES, config.dim, classes)
        self.embed = nn.Linear(config.patch**2 * channels, config.dim)
        self.register_buffer("positions", sincos_2d(config.dim, self.grid)[None], persistent=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm_out = Norm(config.dim)
        self.modulation_out = zeroed(nn.Linear(config.dim, 2 * config.dim))
        self.answer = zeroed(nn.Linear(config.dim, config.patch**2 * out))
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for what is not zero; 0.02 for what is told (the paper's section 3.2 and code of ViT)."""
        for name, layer in self.blocks.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("modulation"):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        for layer in (self.embedding.time1, self.embedding.time2, self.embedding.label):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)

    def walk(self, x: Tensor, given: Conditions) -> Iterator[tuple[str, Tensor]]:
        """Each block's name and what comes out of it, as a map of patches [B,D,rows,columns]."""
        h = self._enter(x)
        embedding = functional.silu(self.embedding(given))
        for name, block in zip(self.taps, self.blocks, strict=True):
            h = block(h, embedding)
            yield name, h.transpose(1, 2).unflatten(2, self.grid)

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        """Noised images [B,C,H,W] to the answer, at least float32[B,out,H,W]."""
        h = self._enter(x)
        embedding = functional.silu(self.embedding(given))
        for block in self.blocks:
            h = block(h, embedding)
        shift, scale = self.modulation_out(embedding).chunk(2, dim=1)
        answer = unpatchify(self.answer(modulate(self.norm_out(h), shift, scale)), self.patch, self.grid)
        return answer.to(torch.promote_types(answer.dtype, torch.float32))

    def _enter(self, x: Tensor) -> Tensor:
        patches = patchify(x.to(self.embed.weight.dtype), self.patch)
        return self.embed(patches) + self.positions.to(self.embed.weight.dtype)
