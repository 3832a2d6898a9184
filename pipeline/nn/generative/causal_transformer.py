"""A transformer that says which code comes next, with what it knows of earlier places kept in sampling.

As GPT-2 has it (Radford et al. 2019: norms before attention and MLP, residual branches that begin smaller the more
there are), over the codes of an image row by row, as in Esser et al. 2021 (arXiv 2012.09841), section 3.2.
Shape letters: B samples, N places, K codes, D width, M heads.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.nn.dropout import SampleDropout
from pipeline.nn.generative.mixture import HALF_STEP, drawn


class TransformerConfig(Strict):
    """Settings."""

    name: Literal["transformer"]
    dim: Annotated[int, Field(ge=1)] = 512
    """D."""
    depth: Annotated[int, Field(ge=1)] = 12
    heads: Annotated[int, Field(ge=1)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the embedded places, and after attention and MLP of each block."""

    @model_validator(mode="after")
    def _heads(self) -> TransformerConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self


class Kept:
    """Keys and values of the places that a layer has seen.

    Args:
        shape: B, M, N and D/M.
        like: of their type, on their device.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.seen = 0
        self._both = like.new_zeros(2, *shape)

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All so far, with those of the next places, [B,M,n,D/M]."""
        end = self.seen + key.shape[2]
        self._both[0, :, :, self.seen : end], self._both[1, :, :, self.seen : end] = key, value
        self.seen = end
        return self._both[0, :, :, :end], self._both[1, :, :, :end]


class Attention(nn.Module):
    """Each place to itself and those before it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """[B,N,D] to the same; or, with what is kept, the one place after those."""
        parts = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        query, key, value = parts
        if kept is not None:
            assert x.shape[1] == 1, "one place at a time"
            key, value = kept.extended(key, value)
        h = functional.scaled_dot_product_attention(query, key, value, is_causal=kept is None)
        return self.out(h.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.mlp1, self.mlp2 = nn.Linear(config.dim, 4 * config.dim), nn.Linear(4 * config.dim, config.dim)
        self.dropout1, self.dropout2 = (SampleDropout(config.dropout, f"causal.{index}.{i}") for i in range(2))

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """[B,N,D] to the same."""
        x = x + self.dropout1(self.attention(self.norm1(x), kept))
        return x + self.dropout2(self.mlp2(functional.gelu(self.mlp1(self.norm2(x)))))


class CausalTransformer(nn.Module):
    """p(code | codes before it).

    Args:
        config: sizes.
        codes: K.
        length: N.
        classes: that it may be told; 0: none. What it is told stands before the first place.
    """

    def __init__(self, config: TransformerConfig, codes: int, length: int, classes: int = 0) -> None:
        super().__init__()
        self.config, self.codes, self.length, self.classes = config, codes, length, classes
        self.start = nn.Embedding(max(1, classes), config.dim)
        self.embed = nn.Embedding(codes, config.dim)
        self.positions = nn.Parameter(torch.empty(length, config.dim))
        self.dropout = SampleDropout(config.dropout, "causal.embed")
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, codes, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's."""
        nn.init.normal_(self.positions, std=0.02)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                branch = name.endswith((".out", ".mlp2"))
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if branch else 0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def dim(self) -> int:
        """D, the size of features."""
        return self.config.dim

    def _first(self, samples: int, label: Tensor | None) -> Tensor:
        """What stands before the first place: [B,1,D]."""
        if label is None and self.classes:
            return self.start.weight.mean(dim=0).expand(samples, 1, -1)
        if label is None:
            label = torch.zeros(samples, dtype=torch.int64, device=self.positions.device)
        return self.start(label)[:, None]

    def forward(self, code: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is said of each place by those before it, and features.

        Args:
            code: int64[B,N].
            label: int64[B], of a model with classes; None: the mean of what they stand for.

        Returns:
            Logits, at least float32[B,N,K]; the mean over places of what the middle block gives, [B,D].
        """
        x = torch.cat([self._first(len(code), label), self.embed(code[:, :-1])], dim=1) + self.positions
        x, features = self.dropout(x), x.mean(dim=1)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number == (len(self.blocks) + 1) // 2:
                features = x.mean(dim=1)
        logits = self.head(self.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), features

    @torch.no_grad()
    def sample(self, uniform: Tensor, label: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Draw codes, each place computed once.

        Args:
            uniform: float32[B,N], from 0 to 1.
            label: int64[B], of a model with classes.
            temperature: logits are divided by it.

        Returns:
            int64[B,N].
        """
        shape = (len(uniform), self.config.heads, self.length, self.config.dim // self.config.heads)
        x, made = self._first(len(uniform), label), list[Tensor]()
        kept = [Kept(shape, self.head(self.norm(x))) for _ in self.blocks]
        for place in range(self.length):
            x = x + self.positions[place]
            for block, own in zip(self.blocks, kept, strict=True):
                x = block(x, own)
            made.append(_pick(self.head(self.norm(x))[:, 0], uniform[:, place], temperature))
            x = self.embed(made[-1])[:, None]
        return torch.stack(made, dim=1)

    @torch.no_grad()
    def sample_naively(self, uniform: Tensor, label: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The same, computing all places anew for each: what :meth:`sample` is held against."""
        made = torch.zeros(uniform.shape, dtype=torch.int64, device=uniform.device)
        for place in range(self.length):
            logits, _ = self(made, label)
            made[:, place] = _pick(logits[:, place], uniform[:, place], temperature)
        return made


def _pick(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    return drawn(logits.double() / temperature, uniform.double() + HALF_STEP)
