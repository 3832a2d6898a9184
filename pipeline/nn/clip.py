"""The two towers of a CLIP, and their settings.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021).

Shape letters: B samples, L tokens, E common width.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, to_weights
from pipeline.nn.masking import encode_visible
from pipeline.nn.text import TextEncoder, TextPool

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_SCALE = 100.0
"""Of the inverse temperature, as in the paper."""
Count = Annotated[int, Field(ge=1)]


class TowersConfig(EncoderConfig):
    """Settings of both towers; the defaults are ViT-B/32's."""

    encoder: str = "vit_base_patch32_clip_224"
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = CLIP_MEAN
    std: Annotated[tuple[float, ...], Field(min_length=1)] = CLIP_STD
    dim: Count = 512
    """E."""
    vocab: Count = 49408
    """Tokens that the tokenizer has."""
    length: Count = 77
    """L, tokens of a text: data.captions.length."""
    text_width: Count = 512
    text_depth: Count = 12
    text_heads: Count = 8
    text_pool: TextPool = "end"
    """"end": read from the left, what stands at the end of the text; "mean": read both ways, the mean."""
    end: Annotated[int, Field(ge=0)] = 2
    """The token at which texts end: 2 in a vocabulary of ``sluice prep tokenizer``, 49407 in CLIP's."""

    @model_validator(mode="after")
    def _heads(self) -> TowersConfig:
        if self.text_width % self.text_heads:
            raise ValueError(f"text_heads = {self.text_heads} does not divide text_width = {self.text_width}")
        return self

    @property
    def needs(self) -> dict[str, str]:
        """Fields of the batch that both read."""
        return {
            "image": f"uint8[B,{len(self.mean)},H,W]",
            "text": f"int64[B,{self.length}]",
            "text_length": "int64[B]",
        }

    def text_encoder(self) -> TextEncoder:
        """The text tower with fresh weights."""
        return TextEncoder(
            vocab=self.vocab,
            length=self.length,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            dim=self.dim,
            pool=self.text_pool,
        )

    def check_tokens(self, text: Tensor, length: Tensor) -> None:
        """Be sure that the text tower knows the tokens of a batch, and where texts end.

        Args:
            text: int64[B,L].
            length: int64[B].

        Raises:
            ConfigError: it does not.
        """
        if int(text.max()) >= self.vocab:
            raise ConfigError(
                f"objective.vocab is {self.vocab}, but the batch holds token {int(text.max())}; set it to the "
                "number of tokens that the tokenizer has"
            )
        ends = text.gather(1, length[:, None] - 1)
        if self.text_pool == "end" and bool((ends != self.end).any()):
            raise ConfigError(
                f"objective.end is {self.end}, but texts of the batch end with token "
                f"{int(ends[ends != self.end][0])}; set it to the tokenizer's token for data.captions.end"
            )


class ImageTower(nn.Module):
    """uint8[B,C,H,W] to float[B,E]."""

    def __init__(self, encoder: ImageEncoder, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = dim
        self.projection = nn.Linear(encoder.dim, dim, bias=False)
        nn.init.normal_(self.projection.weight, std=encoder.dim**-0.5)

    def forward(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features of a batch; ``keep``, int64[B,V]: of these patches alone."""
        if keep is None:
            return self.projection(self.encoder(image))
        x = to_weights(self.encoder.normalize(image), self.encoder.backbone)
        return self.projection(encode_visible(self.encoder.backbone, x, keep))

    def train(self, mode: bool = True) -> ImageTower:
        """An encoder that is frozen as a whole stays in evaluation mode, batch norm and dropout included."""
        super().train(mode)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self
