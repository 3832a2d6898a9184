"""CLIP as open_clip reads it: names, shapes and a configuration that ``open_clip.create_model`` loads strictly.

open_clip has two kinds of image tower. A plain vision transformer goes there as open_clip's own, into which timm's can
be written exactly: the bias of the patch embedding, which open_clip has not, is added to the positions of the patches.
So CLIP's published towers keep the names of their published weights. Any other timm model goes there as it is, where
its name alone builds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Export
from pipeline.nn.clip import ImageTower, TowersConfig
from pipeline.nn.encoder import Backbone, EncoderConfig, takes_image_size
from pipeline.nn.text import TextEncoder

CLIP_VOCAB = 49408
CLIP_END = 49407
"""Size of CLIP's vocabulary, and the token that ends a text in it."""
_BLOCK = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}
"""A block of timm and one of open_clip."""
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
Tower = tuple[dict[str, Any], dict[str, Tensor]]
"""Part of the configuration, and weights."""


def open_clip_files(
    config: TowersConfig,
    image: ImageTower,
    text: TextEncoder,
    image_size: tuple[int, int],
    log_scale: Tensor,
    bias: Tensor | None = None,
) -> dict[str, Export]:
    """A model for open_clip, which reads a folder of weights and configuration.

    Args:
        config: of the towers.
        image: tower.
        text: tower.
        image_size: height and width.
        log_scale: logarithm of the inverse temperature, a number.
        bias: of the sigmoid loss, a number; None: there is none.
    """
    folder = "open_clip"
    try:
        vision, weights = image_tower(config, image.encoder.backbone, image.projection, image_size)
        text_config, text_weights = text_tower(text, config.end)
    except ConfigError as error:
        return {f"{folder}/{WEIGHTS}": Export(None, f"not written: {error}")}
    model: dict[str, Any] = {"embed_dim": config.dim, "vision_cfg": vision, "text_cfg": text_config}
    weights |= text_weights | {"logit_scale": log_scale}
    if bias is not None:
        model["init_logit_bias"] = float(bias)
        weights["logit_bias"] = bias
    settings = {"model_cfg": model, "preprocess_cfg": {"mean": config.mean, "std": config.std}}
    return {
        f"{folder}/{WEIGHTS}": Export(weights, "open_clip.create_model('local-dir:FOLDER')"),
        f"{folder}/{CONFIG}": Export(
            json.dumps(settings, indent=2), "its configuration; for open_clip.get_tokenizer, put tokenizer.json there"
        ),
    }


def image_tower(config: EncoderConfig, backbone: Backbone, projection: nn.Linear, image_size: tuple[int, int]) -> Tower:
    """``vision_cfg`` and the weights below "visual.".

    Args:
        config: what the backbone was built from.
        backbone: a timm model without classifier.
        projection: to the common width, without bias.
        image_size: height and width.

    Raises:
        ConfigError: open_clip has no such tower.
    """
    if len(config.mean) != 3:
        raise ConfigError(f"open_clip reads images of 3 channels, this model {len(config.mean)}")
    sized = {"image_size": list(image_size) if image_size[0] != image_size[1] else image_size[0]}
    reason = _not_native(backbone)
    if reason is None:
        settings, weights = _native(backbone)
        return sized | settings, {f"visual.{n}": v for n, v in weights.items()} | {"visual.proj": projection.weight.T}
    if _named(config, backbone, image_size):
        settings = {"timm_model_name": config.encoder, "timm_pool": "", "timm_proj": "linear"}
        weights = {f"visual.trunk.{name}": value for name, value in backbone.state_dict().items()}
        return sized | settings, weights | {"visual.head.proj.weight": projection.weight}
    raise ConfigError(
        f"open_clip cannot hold the encoder {config.encoder!r}: it builds timm models from their names alone, here "
        f"there are encoder_args {config.encoder_args} and images of {image_size[0]}x{image_size[1]}, and its own "
        f"transformer cannot stand in, since {reason}"
    )


def _named(config: EncoderConfig, backbone: Backbone, image_size: tuple[int, int]) -> bool:
    """Whether the name, without arguments, gives this model; what only drops things in training does not count."""
    if takes_image_size(config.encoder) and tuple(backbone.default_cfg["input_size"][1:]) != image_size:
        return False
    if any("drop" not in name for name in config.encoder_args):
        return False
    with torch.device("meta"):
        plain = timm.create_model(config.encoder, num_classes=0).state_dict()
    return {n: t.shape for n, t in plain.items()} == {n: t.shape for n, t in backbone.state_dict().items()}


def _not_native(vit: Backbone) -> str | None:
    """Why open_clip's own transformer cannot stand in; None: it can."""
    if type(vit) is not VisionTransformer:
        return f"a {type(vit).__name__} is another architecture"
    if not vit.has_class_token or vit.num_prefix_tokens != 1 or vit.no_embed_class or vit.pos_embed is None:
        return "it always has one class token, with a position"
    if vit.global_pool not in ("token", "avg") or vit.pool_include_prefix:
        return f"it does not pool by {vit.global_pool!r}"
    known = {name for i in range(len(vit.blocks)) for name in (f"blocks.{i}.{n}" for n in _BLOCK)}
    known |= {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    known |= {f"{norm}.{part}" for norm in ("norm_pre", "norm", "fc_norm") for part in ("weight", "bias")}
    if strangers := sorted(vit.state_dict().keys() - known):
        return f"it has no {strangers[0]}"
    plain = all(type(b) is Block and type(b.mlp.act) is nn.GELU and b.mlp.act.approximate == "none" for b in vit.blocks)
    return None if plain else "its blocks are others"


def _native(vit: Backbone) -> Tower:
    """A plain vision transformer as open_clip's own."""
    first, size = vit.blocks[0], vit.patch_embed.patch_size
    after = not isinstance(vit.fc_norm, nn.Identity)
    last = vit.fc_norm if after else vit.norm
    settings = {
        "layers": len(vit.blocks),
        "width": vit.embed_dim,
        "head_width": vit.embed_dim // first.attn.num_heads,
        "mlp_ratio": first.mlp.fc1.out_features / vit.embed_dim,
        "patch_size": list(size) if size[0] != size[1] else size[0],
        "no_ln_pre": isinstance(vit.norm_pre, nn.Identity),
        "pool_type": "tok" if vit.global_pool == "token" else "avg",
        "final_ln_after_pool": after,
        "norm_kwargs": {"eps": last.eps},
    }
    positions = vit.pos_embed[0].clone()
    if vit.patch_embed.proj.bias is not None:
        positions[1:] += vit.patch_embed.proj.bias
    weights = {
        "conv1.weight": vit.patch_embed.proj.weight,
        "class_embedding": vit.cls_token[0, 0],
        "positional_embedding": positions,
        **_norm("ln_post", last),
        **_blocks(vit.blocks),
    }
    return settings, weights if settings["no_ln_pre"] else weights | _norm("ln_pre", vit.norm_pre)


def text_tower(text: TextEncoder, end: int) -> Tower:
    """``text_cfg`` and the weights of the text.

    Args:
        text: the encoder.
        end: the token that ends a text.

    Raises:
        ConfigError: open_clip has no such tower.
    """
    if text.pool != "end":
        raise ConfigError("open_clip's text tower takes no mean over tokens; it holds objective.text_pool = 'end' only")
    length, width = text.positions.shape
    block: Any = text.blocks[0]
    settings: dict[str, Any] = {
        "context_length": length,
        "vocab_size": text.token_embedding.num_embeddings,
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(text.blocks),
        "pool_type": "eos",
        "eos_id": end,
    }
    if (settings["vocab_size"], end) != (CLIP_VOCAB, CLIP_END):
        # Otherwise open_clip would take CLIP's own vocabulary without a word; so it looks for one beside the weights.
        settings["hf_tokenizer_name"] = "tokenizer.json"
    weights = {
        "token_embedding.weight": text.token_embedding.weight,
        "positional_embedding": text.positions,
        "text_projection": text.projection.weight.T,
        **_norm("ln_final", text.norm),
        **_blocks(text.blocks),
    }
    return settings, weights


def _norm(name: str, norm: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _blocks(blocks: Iterable[nn.Module]) -> dict[str, Tensor]:
    return {
        f"transformer.resblocks.{index}.{_BLOCK[name]}": value
        for index, block in enumerate(blocks)
        for name, value in block.state_dict().items()
    }
