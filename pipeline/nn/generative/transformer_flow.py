"""A flow of causal transformers over patches: TarFlow. Each block shifts and scales a patch by what it sees before it.

Zhai et al., "Normalizing Flows are Capable Generative Models" (ICML 2025, arXiv 2412.06329), section 2; sizes, initial
values and the order of patches are those of the authors' code (apple/ml-tarflow). Blocks alternate between reading
patches from the first and from the last. Noise becomes an image patch by patch, with the keys and values of earlier
patches kept.
Shape letters: B samples, C channels, H height, W width, N patches, P numbers of a patch, M heads, E width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import to_weights
from pipeline.nn.generative.invertible import Coded, wide
from pipeline.nn.images import patchify, unpatchify

POSITION_STD = 0.01
"""Of the initial positions."""


class TransformerConfig(Strict):
    """Settings; the defaults are the paper's for ImageNet at 64 pixels."""

    name: Literal["transformer"]
    patch: Annotated[int, Field(ge=1)] = 2
    dim: Annotated[int, Field(ge=1)] = 768
    """E."""
    blocks: Annotated[int, Field(ge=1)] = 8
    """Transformers, each an invertible map."""
    layers: Annotated[int, Field(ge=1)] = 8
    """Of each transformer."""
    head_dim: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.dim % self.head_dim:
            raise ValueError(f"head_dim = {self.head_dim} does not divide dim = {self.dim}")
        return self


class Norm(nn.LayerNorm):
    """Layer norm in fp32 whatever the input."""

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and type."""
        with torch.autocast(input.device.type, enabled=False):
            x = wide(input)
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class Cache:
    """Keys and values of the patches that were made, of one layer: [B,M,N,E/M] each."""

    def __init__(self, patches: int) -> None:
        self.patches, self.count = patches, 0
        self.held: Tensor | None = None

    def add(self, key_value: Tensor) -> Tensor:
        """Of one more patch, [2,B,M,1,E/M]; gives those of all so far."""
        if self.held is None:
            shape = (*key_value.shape[:3], self.patches, key_value.shape[-1])
            self.held = key_value.new_empty(shape)
        self.held[:, :, :, self.count] = key_value[:, :, :, 0]
        self.count += 1
        return self.held[:, :, :, : self.count]


class Layer(nn.Module):
    """Attention to what came before, and an MLP; each with a norm before it and a shortcut around it."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """[B,N,E] to the same; with a cache, of one patch after those that it holds, [B,1,E]."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        if cache is not None:
            key, value = cache.add(qkv[1:])
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Block(nn.Module):
    """A transformer that says what each patch is shifted and scaled by, from the patches before it alone.

    Args:
        config: settings.
        patches: N.
        size: P.
        backwards: patches are read from the last to the first.
    """

    def __init__(self, config: TransformerConfig, patches: int, size: int, backwards: bool) -> None:
        super().__init__()
        self.backwards = backwards
        self.embed = nn.Linear(size, config.dim)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(patches, config.dim))
        self.layers = nn.ModuleList([Layer(config.dim, config.head_dim) for _ in range(config.layers)])
        self.out = nn.Linear(config.dim, 2 * size)
        nn.init.zeros_(self.out.weight)  # the bias begins as drawn, as in the authors' code

    def ordered(self, x: Tensor) -> Tensor:
        """[...,N,P] in the order of reading, or back."""
        return x.flip(-2) if self.backwards else x

    def affine(self, x: Tensor, first: int = 0, caches: list[Cache] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the *next* patch of each is scaled and shifted by, and the layer in the middle.

        Args:
            x: patches in the order of reading, [B,N,P].
            first: number of the first of them.
            caches: of each layer, where ``x`` is one patch.

        Returns:
            Logarithms of what is divided by, and shifts, at least float32[B,N,P]; [B,N,E].
        """
        positions = self.ordered(self.positions)[first : first + x.shape[1]]
        h = self.embed(to_weights(x, self)) + positions.to(self.positions.dtype)
        middle = h
        for number, layer in enumerate(self.layers):
            h = layer(h, None if caches is None else caches[number])
            middle = h if number == len(self.layers) // 2 else middle
        log_scale, shift = wide(self.out(h)).chunk(2, dim=-1)
        return log_scale, shift, middle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [B,N,P] to the same, the log-determinant, [B], and the layer in the middle, pooled: [B,E]."""
        x = self.ordered(x)
        log_scale, shift, middle = self.affine(x)
        # The first patch of all is seen by nothing and stays as it is.
        log_scale, shift = (functional.pad(part[:, :-1], (0, 0, 1, 0)) for part in (log_scale, shift))
        y = (x - shift) * (-log_scale).exp()
        return self.ordered(y), -log_scale.flatten(1).sum(dim=1), middle.mean(dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """[B,N,P] to the same, patch by patch."""
        y = self.ordered(y)
        caches = [Cache(y.shape[1]) for _ in self.layers]
        made = [y[:, :1]]
        for number in range(y.shape[1] - 1):
            log_scale, shift, _ = self.affine(made[-1], number, caches)
            made.append(y[:, number + 1 : number + 2] * log_scale.exp() + shift)
        return self.ordered(torch.cat(made, dim=1))


class TransformerFlow(nn.Module):
    """The network.

    Args:
        config: settings.
        shape: C, H, W of the images.

    Raises:
        ConfigError: an image size that the patches do not divide.
    """

    def __init__(self, config: TransformerConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        if height % config.patch or width % config.patch:
            raise ConfigError(
                f"images of {height}x{width} cannot be cut into patches of {config.patch}; take sizes that are "
                f"multiples of {config.patch} (data.image.size), or another network.patch"
            )
        self.patch, self.grid = (config.patch, config.patch), (height // config.patch, width // config.patch)
        count, size = self.grid[0] * self.grid[1], channels * config.patch**2
        if count < 2:
            raise ConfigError(
                f"network.patch = {config.patch} leaves one patch, which nothing is before; set a smaller"
            )
        self.blocks = nn.ModuleList([Block(config, count, size, bool(n % 2)) for n in range(config.blocks)])
        self.dim = config.dim
        """F."""

    def forward(self, x: Tensor) -> Coded:
        """Dequantised images [B,C,H,W]; features are the middle layer of the first block, which sees the images."""
        x = patchify(wide(x), self.patch)
        log_det, features = x.new_zeros(len(x)), list[Tensor]()
        for block in self.blocks:
            x, of_block, middle = block(x)
            log_det = log_det + of_block
            features.append(middle)
        return Coded(x.flatten(1), log_det, features[0])

    def inverse(self, noise: Tensor) -> Tensor:
        """[B,D] to images [B,C,H,W]."""
        x = wide(noise).unflatten(1, (self.grid[0] * self.grid[1], -1))
        blocks: Any = self.blocks
        for block in reversed(blocks):
            x = block.inverse(x)
        return unpatchify(x, self.patch, self.grid)
