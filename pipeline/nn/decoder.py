"""The decoder of a masked autoencoder: from the tokens of visible patches to a prediction for every patch.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), section 3 and appendix A.1.
Shape letters: B samples, N patches, P prefix tokens, V visible patches, D encoder width, E decoder width, T targets.
"""

from functools import partial
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.nn.positions import sincos_2d
from pipeline.nn.start import xavier_linear


class Decoder(nn.Module):
    """Mask tokens where patches were hidden, fixed positions, transformer blocks, a linear prediction per patch.

    Args:
        width: D, of the encoder.
        targets: T, numbers to predict per patch.
        prefix: P, tokens before the patches; they are decoded along, at position zero.
        grid: rows and columns of patches.
        dim: E.
        depth: transformer blocks.
        heads: attention heads; must divide E.
        checkpointing: compute activations of the blocks anew in the backward pass.
    """

    positions: Tensor

    def __init__(
        self,
        width: int,
        targets: int,
        prefix: int,
        grid: tuple[int, int],
        *,
        dim: int,
        depth: int,
        heads: int,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.prefix = prefix
        self.checkpointing = checkpointing
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        table = torch.cat([torch.zeros(prefix, dim), sincos_2d(dim, grid)])
        self.register_buffer("positions", table[None], persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, targets)
        self.apply(xavier_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Predictions for all patches.

        Args:
            tokens: float[B,P+V,D].
            keep: int64[B,V], numbers of the visible patches, in the order of ``tokens``.

        Returns:
            float[B,N,T], patches in their order in the image.
        """
        prefix, visible = self.embed(tokens).tensor_split([self.prefix], dim=1)
        masks = self.mask_token.to(visible.dtype).expand(len(visible), self.positions.shape[1] - self.prefix, -1)
        # Scattered rather than gathered from both: the gradient of a gather is added atomically, that of this is not.
        patches = masks.scatter(1, keep[..., None].expand_as(visible), visible)
        x = torch.cat([prefix, patches], dim=1) + self.positions.to(visible.dtype)
        x = checkpoint_seq(self.blocks, x) if self.checkpointing else self.blocks(x)
        return self.predict(self.norm(x)[:, self.prefix :])
