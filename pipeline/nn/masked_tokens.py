"""Mask tokens in place of some patches, ahead of the position embedding: BEiT's and iBOT's way of masking.

How many patches are masked differs from view to view: Zhou et al., "iBOT: Image BERT Pre-Training with Online
Tokenizer" (ICLR 2022), section 4.1. Shape letters: R rows (views of samples), N patches, M masked ones at most, D
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from timm.layers import PatchEmbed
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, StepContext
from pipeline.nn.encoder import Backbone
from pipeline.nn.masking import block_order

Part = Annotated[float, Field(ge=0, le=1)]


class Masking(Strict):
    """Which patches are masked; the defaults are iBOT's for ViTs."""

    shape: Literal["block", "random"] = "block"
    """A few rectangles, or patches drawn one by one."""
    views: Part = 0.5
    """Part of the views that are masked at all."""
    ratio: tuple[Part, Part] = (0.1, 0.5)
    """Of their patches, a part drawn between these is masked, rounded down."""

    @model_validator(mode="after")
    def _ordered(self) -> Masking:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio goes from {self.ratio[0]} down to {self.ratio[1]}; write the smaller one first")
        return self


class Masks(NamedTuple):
    """Of each row."""

    hidden: Tensor
    """bool[R,N]."""
    index: Tensor
    """int64[R,M]: masked patches first, then some that are not, so that all rows have as many."""
    weights: Tensor
    """float32[R,M]: one over the number of masked patches for each of them, 0 for the others."""

    def gather(self, x: Tensor) -> Tensor:
        """Of all patches [R,N,...] those of ``index``: [R,M,...]."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))


class MaskedTokens(nn.Module):
    """The token, and where it is put.

    Args:
        backbone: a plain vision transformer of timm.
        config: which patches.
        image_size: height and width of the views.

    Raises:
        ConfigError: the encoder has no patches that could be replaced, or no class token beside them; or too few.
    """

    def __init__(self, backbone: Backbone, config: Masking, image_size: tuple[int, int]) -> None:
        super().__init__()
        embed = getattr(backbone, "patch_embed", None)
        if type(embed) is not PatchEmbed or getattr(backbone, "cls_token", None) is None:
            raise ConfigError(
                f"objective.masked: {type(backbone).__name__} has no patches and class token of a plain vision "
                "transformer; take e.g. 'vit_small_patch16_224', or leave 'masked' out"
            )
        patch: Any = embed.patch_size
        self.config, self.grid = config, (image_size[0] // patch[0], image_size[1] // patch[1])
        self.token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        if self.most == 0:
            raise ConfigError(f"objective.masked.ratio: {config.ratio[1]} of {self.grid[0]}x{self.grid[1]} is no patch")

    @property
    def most(self) -> int:
        """M."""
        return int(self.config.ratio[1] * self.grid[0] * self.grid[1])

    def draw(self, batch: Batch, ctx: StepContext, purpose: str, views: Sequence[str]) -> Masks:
        """Masks of each view of each sample, those of the first view first."""
        each = [self._one(batch, ctx, f"{purpose}.{view}") for view in views]
        return Masks(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def _one(self, batch: Batch, ctx: StepContext, purpose: str) -> Masks:
        patches = self.grid[0] * self.grid[1]
        coin, size = ctx.random(batch, f"{purpose}.size").uniform(2).unbind(dim=1)
        low, high = self.config.ratio
        count = ((low + (high - low) * size) * patches).floor().long() * (coin < self.config.views)
        random = ctx.random(batch, purpose)
        blocks = self.config.shape == "block"
        order = block_order(random, self.grid, count) if blocks else random.permutation(patches)
        index = order.flip(1)[:, : self.most]  # the last ones of an order are masked first
        weights = (torch.arange(self.most, device=index.device) < count[:, None]).float()
        hidden = torch.zeros_like(order, dtype=torch.bool).scatter(1, index, weights.bool())
        return Masks(hidden, index, weights / count.clamp_min(1)[:, None])

    @contextmanager
    def put(self, backbone: Backbone, masks: Masks | None) -> Iterator[None]:
        """Inside, the backbone sees the token where ``masks`` hide a patch."""
        if masks is None:
            yield
            return

        def fill(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
            hidden = masks.hidden.view(*x.shape[:-1], 1)
            return torch.where(hidden, self.token.to(x.dtype).view(x.shape[-1]), x)

        handle = backbone.patch_embed.register_forward_hook(fill)
        try:
            yield
        finally:
            handle.remove()
