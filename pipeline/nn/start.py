"""Initial weights of vision transformers, as the authors of each method drew them.

timm draws matrices with a standard deviation of 0.02 whatever their size, as ViT-B has it; a narrow one starts too
small with it and learns far less in a short run. Each function here changes a timm backbone in place and leaves alone
what is not a transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.nn.encoder import Backbone
from pipeline.nn.positions import sincos_2d

Start: TypeAlias = Callable[[Backbone], None]


def xavier_linear(module: nn.Module) -> None:
    """Xavier-uniform for a linear layer, its bias zero. For ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_as_mae(backbone: Backbone) -> None:
    """He et al. 2021: Xavier for linear layers and the patch embedding, 0.02 for tokens, fixed positions."""
    backbone.apply(xavier_linear)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("cls_token", "reg_token")):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("patch_embed.proj.weight", "embeds.proj.weight")):
            nn.init.xavier_uniform_(parameter.data.view(len(parameter), -1))
        elif name == "pos_embed" and isinstance(backbone, VisionTransformer | Eva):
            fix_positions(parameter, backbone.patch_embed.grid_size)
        elif name == "embeds.pos_embed":
            rows, columns, dim = parameter.shape[1:]
            parameter.data = sincos_2d(dim, (rows, columns)).view(1, rows, columns, dim)
            parameter.requires_grad_(False)


def fix_positions(table: nn.Parameter, grid: tuple[int, int]) -> None:
    """Sines and cosines in two dimensions for patches, zero for the tokens before them; not trained."""
    prefix = table.shape[1] - grid[0] * grid[1]
    patches = sincos_2d(table.shape[-1], grid)
    table.data = torch.cat([torch.zeros(prefix, table.shape[-1]), patches])[None]
    table.requires_grad_(False)
