"""The predictor of I-JEPA: from the tokens of what is seen to the features of blocks that are not.

Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture" (CVPR 2023),
section 3 and appendix A. Shape letters: B samples, N patches, V seen ones at most, T blocks, M patches of a block, D
width of the encoder, E of the predictor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.nn.positions import sincos_2d


class Predictor(nn.Module):
    """A narrow transformer with fixed positions; matrices are drawn with 0.02, truncated.

    Args:
        width: D.
        grid: rows and columns of patches.
        dim: E.
        depth: blocks.
        heads: attention heads; must divide E.
    """

    positions: Tensor

    def __init__(self, width: int, grid: tuple[int, int], *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)
        self.blocks = nn.ModuleList([Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, keep: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
        """Features of all patches of all blocks; no block sees another.

        Args:
            tokens: float[B,V,D], of the patches that are seen.
            keep: int64[B,V], their numbers.
            valid: bool[B,V]; the others fill up samples that see fewer.
            wanted: int64[B,T,M], numbers of the patches that are predicted.

        Returns:
            float[B,T,M,D].
        """
        blocks = wanted.shape[1]
        x = self.embed(tokens)
        positions = self.positions.to(x.dtype)
        x = (x + positions[keep]).repeat_interleave(blocks, dim=0)
        asked = (self.mask_token.to(x.dtype) + positions[wanted]).flatten(0, 1)
        known = valid.repeat_interleave(blocks, dim=0)
        mask = torch.cat([known, known.new_ones(asked.shape[:2])], dim=1)[:, None, None]
        x = torch.cat([x, asked], dim=1)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.predict(self.norm(x[:, -asked.shape[1] :])).unflatten(0, (-1, blocks))
