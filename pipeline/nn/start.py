"""Initial weights of vision transformers, as the authors of each method drew them.

timm draws matrices with a standard deviation of 0.02 whatever their size, as suits ViT-B; a narrow transformer starts
too small with it and learns far less in a short run. Each function here changes a timm backbone in place, and leaves
alone what its authors' code says nothing about: other kinds of networks, and parts that their transformers lack.

Shape letters: D width, C channels, P side of a patch, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.nn.encoder import Backbone
from pipeline.nn.positions import sincos_2d
from pipeline.nn.text import TextEncoder

Start: TypeAlias = Callable[[Backbone], None]
JOINT = {"qkv": 3, "kv": 2}
"""Linear layers of timm that hold several, which other libraries hold, and draw, one by one."""


def start_as_clip(backbone: Backbone) -> None:
    """CLIP's image tower (Radford et al. 2021; open_clip's is the same): tokens and positions of std D^-0.5.

    Its code says nothing about the blocks, so they are as torch draws a MultiheadAttention (Xavier for query, key and
    value together) and linear layers (uniform, +-inputs^-0.5, biases too). The patch projection has no bias there.
    """
    if not isinstance(backbone, VisionTransformer):
        return
    for table in (backbone.cls_token, backbone.reg_token, backbone.pos_embed):
        if table is not None:
            nn.init.normal_(table, std=backbone.embed_dim**-0.5)
    if isinstance(backbone.patch_embed, PatchEmbed):
        backbone.patch_embed.proj.reset_parameters()
        _zero_bias(backbone.patch_embed.proj)
    for name, layer in backbone.blocks.named_modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
            if name.endswith(".qkv"):
                nn.init.xavier_uniform_(layer.weight)
            if ".attn." in name:
                _zero_bias(layer)


def start_as_big_vision(backbone: Backbone) -> None:
    """Google's ViTs, those of SigLIP among them: github.com/google-research/big_vision, models/vit.py.

    Xavier for all linear layers, query, key and value each for itself; biases 1e-6 in the MLPs and zero elsewhere; a
    patch projection of variance 1/(C P^2), truncated; positions of std D^-0.5; a class token of zeros. Beyer et al.,
    "Better plain ViT baselines for ImageNet-1k" (2022), is the recipe of a classifier that starts so.
    """
    if not isinstance(backbone, VisionTransformer):
        return
    if backbone.pos_embed is not None:
        nn.init.normal_(backbone.pos_embed, std=backbone.embed_dim**-0.5)
    if backbone.cls_token is not None:
        nn.init.zeros_(backbone.cls_token)
    if isinstance(backbone.patch_embed, PatchEmbed):
        lecun_normal(backbone.patch_embed.proj.weight)
        _zero_bias(backbone.patch_embed.proj)
    _xavier_blocks(backbone, mlp_bias=1e-6)
    if (pool := getattr(backbone, "attn_pool", None)) is not None and hasattr(pool, "latent"):
        bound = math.sqrt(6 / (1 + backbone.embed_dim))
        nn.init.uniform_(pool.latent, -bound, bound)


def start_text_as_big_vision(text: TextEncoder) -> None:
    """SigLIP's text tower: github.com/google-research/big_vision, models/proj/image_text/text_transformer.py."""
    width = text.positions.shape[1]
    nn.init.normal_(text.token_embedding.weight, std=width**-0.5)
    nn.init.normal_(text.positions, std=width**-0.5)
    _xavier_blocks(text.blocks, mlp_bias=1e-6)
    lecun_normal(text.projection.weight)


def start_as_moco(backbone: Backbone) -> None:
    """MoCo v3's ViT (Chen, Xie and He 2021; github.com/facebookresearch/moco-v3, vits.py), on which it ran SimCLR, too.

    Fixed positions; Xavier for all linear layers, query, key and value each for itself, and for the patch projection;
    biases zero; a class token of std 1e-6.
    """
    if not isinstance(backbone, VisionTransformer):
        return
    _xavier_blocks(backbone, mlp_bias=0.0)
    for token in (backbone.cls_token, backbone.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    if isinstance(backbone.patch_embed, PatchEmbed):
        nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.data.flatten(1))
        _zero_bias(backbone.patch_embed.proj)
    if backbone.pos_embed is not None:
        fix_positions(backbone.pos_embed, backbone.patch_embed.grid_size, rows_first=True)


def start_as_moco_v2(backbone: Backbone) -> None:
    """MoCo v2's ResNets are torchvision's: the last scale of a residual branch begins at one, not at zero as in timm's.

    Transformers, which its authors did not train, start as in version 3.
    """
    start_as_moco(backbone)
    for layer in backbone.modules():
        if isinstance(layer, _BatchNorm) and layer.affine:
            nn.init.ones_(layer.weight)


def start_as_mae(backbone: Backbone) -> None:
    """He et al. 2021: Xavier for linear layers and the patch embedding, 0.02 for tokens, fixed positions."""
    backbone.apply(xavier_linear)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("cls_token", "reg_token")):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("patch_embed.proj.weight", "embeds.proj.weight")):
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif name == "pos_embed" and isinstance(backbone, VisionTransformer | Eva):
            fix_positions(parameter, backbone.patch_embed.grid_size, rows_first=False)
        elif name == "embeds.pos_embed":
            rows, columns, dim = parameter.shape[1:]
            parameter.data = sincos_2d(dim, (rows, columns)).view(1, rows, columns, dim)
            parameter.requires_grad_(False)


def start_as_dino(backbone: Backbone) -> None:
    """Caron et al. 2021, vision_transformer.py, which iBOT's is, too: 0.02, truncated, for matrices and all tokens.

    Biases are zero, the patch projection is as torch draws a convolution. Its ResNets are torchvision's.
    """
    if not isinstance(backbone, VisionTransformer):
        start_as_moco_v2(backbone)
        return
    for layer in backbone.blocks.modules():
        if isinstance(layer, nn.Linear):
            _truncated(layer)
    for table in (backbone.cls_token, backbone.reg_token, backbone.pos_embed):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)
    if isinstance(backbone.patch_embed, PatchEmbed):
        backbone.patch_embed.proj.reset_parameters()


def start_as_ijepa(backbone: Backbone) -> None:
    """Assran et al. 2023, src/helper.py: 0.02, truncated, for matrices and the patch projection, fixed positions.

    Their models divide the last layers of blocks by the root of twice the block's number, but what builds them for
    training draws these anew.
    """
    if not isinstance(backbone, VisionTransformer):
        return
    for layer in backbone.modules():
        if isinstance(layer, nn.Linear):
            _truncated(layer)
    _truncated(backbone.patch_embed.proj)
    if backbone.pos_embed is not None:
        fix_positions(backbone.pos_embed, backbone.patch_embed.grid_size, rows_first=False)


def xavier_linear(module: nn.Module) -> None:
    """Xavier-uniform for a linear layer, its bias zero. For ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        _zero_bias(module)


def fix_positions(table: nn.Parameter, grid: tuple[int, int], *, rows_first: bool) -> None:
    """Sines and cosines in two dimensions, and zero for the tokens before the patches; not trained.

    Args:
        table: [1,prefix+N,D].
        grid: rows and columns of patches.
        rows_first: the first half of the numbers tells the row, as in MoCo v3; else the column, as in MAE.
    """
    prefix = table.shape[1] - grid[0] * grid[1]
    column, row = sincos_2d(table.shape[-1], grid).chunk(2, dim=1)
    patches = torch.cat([row, column] if rows_first else [column, row], dim=1)
    table.data = torch.cat([torch.zeros(prefix, table.shape[-1]), patches])[None]
    table.requires_grad_(False)


def _xavier_blocks(module: nn.Module, mlp_bias: float) -> None:
    """Xavier-uniform for every linear layer; where one holds several, for each of these; biases zero but in MLPs."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            outputs = layer.out_features // JOINT.get(name.rpartition(".")[2], 1)
            bound = math.sqrt(6 / (layer.in_features + outputs))
            nn.init.uniform_(layer.weight, -bound, bound)
            _zero_bias(layer)
            if layer.bias is not None and mlp_bias and "mlp" in name.split("."):
                nn.init.normal_(layer.bias, std=mlp_bias)


def _truncated(layer: Any) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    _zero_bias(layer)


def lecun_normal(weight: Tensor) -> None:
    """Flax's default for kernels: variance 1/inputs, a normal distribution that is cut at two of its deviations."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # what cutting leaves of the deviation
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _zero_bias(layer: Any) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
