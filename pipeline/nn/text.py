"""A transformer on token ids, as CLIP has it (Radford et al. 2021, section 2.4), and one that reads both ways.

Shape letters: B texts, L tokens of a text with its padding, D width, E width of the output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

TextPool = Literal["end", "mean"]
Output = TextPool | Literal["none"]


class TextEncoder(nn.Module):
    """Token and position embeddings, transformer blocks, one vector per text, a linear map.

    Args:
        vocab: number of token ids.
        length: L, the longest text.
        width: D.
        depth: blocks.
        heads: attention heads; must divide D.
        dim: E.
        pool: "end" reads from left to right and takes what stands at the last token of the text; "mean" reads both
            ways and takes the mean over the tokens of the text; "none" reads both ways and gives every token.
    """

    causal: Tensor

    def __init__(self, *, vocab: int, length: int, width: int, depth: int, heads: int, dim: int, pool: Output) -> None:
        super().__init__()
        self.dim, self.pool = dim, pool
        self.token_embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dim, bias=False)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).tril(), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """CLIP's: residual branches shrink with the depth; the biases of the MLPs stay as torch draws them."""
        width, depth = self.positions.shape[1], len(self.blocks)
        branch = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        block: Any
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=branch)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=branch)
            for layer in (block.attn.qkv, block.attn.proj):
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, text: Tensor, length: Tensor) -> Tensor:
        """One vector per text, or per token.

        Args:
            text: int64[B,L], what follows the tokens of a text does not matter.
            length: int64[B], tokens of each text, its end included; at least 1.

        Returns:
            float[B,E], or float[B,L,E], in the precision of the weights or of autocast.
        """
        size = text.shape[1]
        inside = torch.arange(size, device=text.device) < length[:, None]
        x = self.token_embedding(text) + self.positions[:size]
        # Read from the left, a token never sees the padding behind it; read both ways, padding must be hidden.
        mask = self.causal[:size, :size] if self.pool == "end" else inside[:, None, None, :]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        x = self.norm(x)
        if self.pool == "none":
            return self.projection(x)
        if self.pool == "end":
            pooled = x[torch.arange(len(x), device=x.device), length - 1]
        else:
            pooled = (x * inside[..., None]).sum(dim=1) / length[:, None]
        return self.projection(pooled.to(x.dtype))

    def layers(self, prefix: str) -> list[list[str]]:
        """Prefixes of parameter names from the input to the output."""
        blocks = [[f"{prefix}blocks.{index}."] for index in range(len(self.blocks))]
        first = [f"{prefix}token_embedding.", f"{prefix}positions"]
        return [first, *blocks, [f"{prefix}norm.", f"{prefix}projection."]]
