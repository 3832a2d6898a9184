"""Where a vision transformer looks: the attention of its class token in the last block.

Shape letters: B samples, N patches, P prefix tokens, M heads.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.nn.encoder import Backbone


@torch.no_grad()
def class_attention(backbone: Backbone, x: Tensor) -> Tensor | None:
    """The weights that the class token gives the patches, the mean over heads.

    Args:
        backbone: a timm model.
        x: normalised images, float[B,C,H,W].

    Returns:
        float32[B,N]; None where the model has no class token, or other blocks than a plain transformer.
    """
    if not isinstance(backbone, VisionTransformer) or backbone.cls_token is None:
        return None
    attention: Any = getattr(backbone.blocks[-1], "attn", None)
    if attention is None or not hasattr(attention, "qkv"):
        return None
    given: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        backbone.forward_features(x)
    finally:
        handle.remove()
    tokens = given[0]
    heads = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).float()
    query, key = attention.q_norm(heads[0][:, :, :1]), attention.k_norm(heads[1])
    weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    return weights.mean(dim=1)[:, 0, backbone.num_prefix_tokens :]
