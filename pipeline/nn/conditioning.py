"""What denoisers are told beside the image: time, class, text.

Sinusoidal embedding: Vaswani et al. 2017 in the order of ADM (Dhariwal and Nichol 2021), cosines first. Fourier
features: Tancik et al. 2020, as in NCSN++ (Song et al. 2021). Text as tokens to attend to:
Rombach et al. 2022 (2112.10752). Shape letters: B samples, E embedding, L tokens, D width of a token.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.protocols import Batch
from pipeline.nn.text import TextEncoder

TimeEmbedding = Literal["sinusoidal", "fourier"]


class Text(NamedTuple):
    """B texts in tokens."""

    token: Tensor
    """int64[B,L]."""
    length: Tensor
    """int64[B], tokens of each; 0 for no text."""


Prompt = Tensor | Text
"""What images are asked for: int64[B], a class each, where the number of classes stands for none; or a text each."""


def prompt_of(batch: Batch) -> Prompt | None:
    """What the images of a batch are of, by its fields: "text" and "text_length", or "label", or nothing."""
    if "text" in batch:
        return Text(batch["text"], batch["text_length"])
    return batch.get("label")


class Told(NamedTuple):
    """What a network is told of B images beside the time."""

    label: Tensor | None = None
    """int64[B]; the number of classes stands for none."""
    tokens: Tensor | None = None
    """float[B,L,D], the first of which stands for no text."""
    inside: Tensor | None = None
    """bool[B,L], which tokens are the text's."""

    def beside_none(self, classes: int) -> Told:
        """[2B]: the same, and after it as many of no class and no text."""
        label, tokens, inside = self
        if label is not None:
            label = torch.cat([label, torch.full_like(label, classes)])
        if tokens is not None and inside is not None:
            first = torch.arange(inside.shape[1], device=inside.device) == 0
            tokens, inside = torch.cat([tokens, tokens]), torch.cat([inside, first.expand_as(inside)])
        return Told(label, tokens, inside)


class Conditions(NamedTuple):
    """Of B samples."""

    time: Tensor
    """float[B]."""
    told: Told = Told()


class Embedding(nn.Module):
    """Time, and class where there are any, to one vector.

    Args:
        kind: of time.
        frequencies: sines and cosines, even.
        width: E.
        classes: number of classes; 0: none. One more row stands for "no class".
    """

    bands: Tensor

    def __init__(self, kind: TimeEmbedding, frequencies: int, width: int, classes: int) -> None:
        super().__init__()
        half = frequencies // 2
        fixed = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        random = torch.randn(half, dtype=torch.float64) * 16 * 2 * math.pi
        self.register_buffer("bands", (fixed if kind == "sinusoidal" else random).float(), persistent=kind == "fourier")
        self.time1, self.time2 = nn.Linear(frequencies, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.classes = classes

    def forward(self, given: Conditions) -> Tensor:
        """[B,E], in the precision of the weights or of autocast."""
        # float32 whatever the weights are: in bf16 neighbouring times would be one
        angle = given.time.float()[:, None] * self.bands.float()
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.time1.weight.dtype)
        embedded = self.time2(functional.silu(self.time1(waves)))
        if self.label is None:
            return embedded
        label = given.told.label
        assert label is not None, "a network with classes is told one, or that there is none"
        return embedded + self.label(label)


class TextConfig(Strict):
    """Settings of the text encoder that is trained with the denoiser."""

    vocab: Annotated[int, Field(ge=1)] = 49408
    """Tokens that the tokenizer has."""
    length: Annotated[int, Field(ge=1)] = 77
    """L, tokens of a text: data.captions.length."""
    width: Annotated[int, Field(ge=1)] = 512
    """D."""
    depth: Annotated[int, Field(ge=0)] = 6
    """Blocks; 0: embeddings of tokens and positions alone."""
    heads: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _heads(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}")
        return self


class TextReader(nn.Module):
    """Texts to tokens to attend to: a transformer that reads both ways, and one token before it that stands for none.

    That one is always there, so that there is something to attend to where a text was dropped.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.encoder = TextEncoder(
            vocab=config.vocab, length=config.length, width=config.width, depth=config.depth, heads=config.heads,
            dim=config.width, pool="none",
        )  # fmt: skip
        self.none = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)

    def forward(self, text: Text) -> Told:
        """Tokens [B,1+L,D]."""
        tokens = self.encoder(text.token, text.length.clamp(min=1))
        place = torch.arange(text.token.shape[1], device=text.token.device)
        first = torch.ones_like(text.length[:, None], dtype=torch.bool)
        inside = torch.cat([first, place < text.length[:, None]], dim=1)
        return Told(None, torch.cat([self.none.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1), inside)
