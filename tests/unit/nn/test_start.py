"""Initial weights against the formulas of each method's published code, written out here once more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.protocols import DataFacts
from pipeline.nn.construct import construct_encoder
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.start import start_as_clip, start_as_moco
from pipeline.objectives import clip, mae, moco, simclr, supervised

D, PATCH, SIZE = 96, 8, (16, 24)
VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": PATCH, "embed_dim": D, "depth": 2, "num_heads": 2},
}
SMALL = {"dim": 32, "vocab": 400, "length": 40, "text_width": D, "text_depth": 2, "text_heads": 2}
PIXELS = 3 * PATCH**2
Law = tuple[str, float]
"""A distribution, and its bound ("uniform") or its deviation."""
ZERO: Law = ("constant", 0.0)
ONE: Law = ("constant", 1.0)
NORMS = {"norm.weight": ONE, "norm.bias": ZERO, "norm1.weight": ONE, "norm1.bias": ZERO}
NORMS |= {"norm2.weight": ONE, "norm2.bias": ZERO}


def xavier(inputs: int, outputs: int) -> Law:
    return "uniform", math.sqrt(6 / (inputs + outputs))


def torchs(inputs: int) -> Law:
    return "uniform", inputs**-0.5


def xavier_vit(joint: bool, mlp_bias: Law) -> dict[str, Law]:
    return NORMS | {
        "attn.qkv.weight": xavier(D, 3 * D if joint else D),
        "attn.qkv.bias": ZERO,
        "attn.proj.weight": xavier(D, D),
        "attn.proj.bias": ZERO,
        "mlp.fc1.weight": xavier(D, 4 * D),
        "mlp.fc1.bias": mlp_bias,
        "mlp.fc2.weight": xavier(4 * D, D),
        "mlp.fc2.bias": mlp_bias,
    }


# openai/CLIP, model.py: what it does not name is as torch's modules draw it.
CLIP = NORMS | {
    "cls_token": ("normal", D**-0.5),
    "pos_embed": ("normal", D**-0.5),
    "patch_embed.proj.weight": torchs(PIXELS),
    "patch_embed.proj.bias": ZERO,
    "attn.qkv.weight": xavier(D, 3 * D),
    "attn.qkv.bias": ZERO,
    "attn.proj.weight": torchs(D),
    "attn.proj.bias": ZERO,
    "mlp.fc1.weight": torchs(D),
    "mlp.fc1.bias": torchs(D),
    "mlp.fc2.weight": torchs(4 * D),
    "mlp.fc2.bias": torchs(4 * D),
}
CLIP_TOWER = {name: law for name, law in CLIP.items() if name != "patch_embed.proj.bias"}
CLIP_TOWER |= {"norm_pre.weight": ONE, "norm_pre.bias": ZERO}
CLIP_TEXT = NORMS | {
    "token_embedding.weight": ("normal", 0.02),
    "positions": ("normal", 0.01),
    "attn.qkv.weight": ("normal", D**-0.5),
    "attn.qkv.bias": ZERO,
    "attn.proj.weight": ("normal", D**-0.5 * (2 * 2) ** -0.5),
    "attn.proj.bias": ZERO,
    "mlp.fc1.weight": ("normal", (2 * D) ** -0.5),
    "mlp.fc1.bias": torchs(D),
    "mlp.fc2.weight": ("normal", D**-0.5 * (2 * 2) ** -0.5),
    "mlp.fc2.bias": torchs(4 * D),
    "projection.weight": ("normal", D**-0.5),
}
# google-research/big_vision, models/vit.py and models/proj/image_text/text_transformer.py, with flax's defaults.
BIG_VISION = xavier_vit(joint=False, mlp_bias=("normal", 1e-6)) | {
    "cls_token": ZERO,
    "pos_embed": ("normal", D**-0.5),
    "patch_embed.proj.weight": ("truncated", PIXELS**-0.5),
    "patch_embed.proj.bias": ZERO,
}
BIG_VISION_TEXT = xavier_vit(joint=False, mlp_bias=("normal", 1e-6)) | {
    "token_embedding.weight": ("normal", D**-0.5),
    "positions": ("normal", D**-0.5),
    "projection.weight": ("truncated", D**-0.5),
}
# facebookresearch/moco-v3, vits.py.
MOCO = xavier_vit(joint=False, mlp_bias=ZERO) | {
    "cls_token": ("normal", 1e-6),
    "patch_embed.proj.weight": xavier(PIXELS, D),
    "patch_embed.proj.bias": ZERO,
}
# facebookresearch/mae, models_mae.py.
MAE = xavier_vit(joint=True, mlp_bias=ZERO) | {
    "cls_token": ("normal", 0.02),
    "patch_embed.proj.weight": xavier(PIXELS, D),
    "patch_embed.proj.bias": torchs(PIXELS),
}


def follows(values: Tensor, law: Law) -> bool:
    """Deviation within five of its standard errors, a bound that is reached and not passed."""
    kind, size = law
    x = values.detach().double().flatten()
    if kind == "constant":
        return bool((x == size).all())
    std, largest = float(x.square().mean().sqrt()), float(x.abs().max())
    kurtosis = {"uniform": 1.8, "normal": 3.0, "truncated": 2.37}[kind]
    error = 5 * math.sqrt((kurtosis - 1) / 4 / len(x))
    edge = {"uniform": size, "truncated": 2 * size / 0.8796, "normal": math.inf}[kind]
    near = len(x) < 4000 or largest > {"uniform": 0.99, "truncated": 0.98, "normal": 0}[kind] * min(edge, 1e9)
    tail = kind != "normal" or len(x) < 4000 or largest > 3.2 * size
    expected = size / math.sqrt(3) if kind == "uniform" else size
    return abs(std / expected - 1) < error and largest <= edge * (1 + 1e-3) and near and tail


def differing(module: torch.nn.Module, laws: dict[str, Law]) -> list[str]:
    """Parameters that follow no law of theirs; ``laws`` go by the ends of names."""
    found = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = [law for end, law in laws.items() if name == end or name.endswith("." + end)]
            if len(own) != 1 or not follows(parameter, own[0]):
                found.append(f"{name} {float(parameter.detach().std(correction=0)):.4f} {own}")
    return found


def build(module: Any, name: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    cls = {clip: "CLIP", mae: "MAE", moco: "MoCo", simclr: "SimCLR", supervised: "Supervised"}[module]
    return getattr(module, cls)(module.Config(**VIT | settings), DataFacts(SIZE, ("a", "b")))


CASES = {
    "clip": (clip, SMALL, CLIP),
    "clip, its tower": (clip, SMALL | {"encoder": "vit_base_patch32_clip_224"}, CLIP_TOWER),
    "siglip": (clip, SMALL | {"loss": "sigmoid"}, BIG_VISION),
    "supervised": (supervised, {}, BIG_VISION),
    "simclr": (simclr, {}, MOCO),
    "moco 2": (moco, {"queue": 4}, MOCO),
    "moco 3": (moco, {"version": 3}, MOCO),
    "mae": (mae, {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 1}, MAE),
}


@pytest.mark.parametrize("case", CASES)
def test_each_objective_starts_its_transformer_as_published(case):
    module, settings, laws = CASES[case]
    assert differing(backbone(build(module, case, **settings)), laws) == []


def backbone(objective: Any) -> Any:
    encoder = objective.encoders()["image"]
    return getattr(encoder, "encoder", encoder).backbone


@pytest.mark.parametrize(("loss", "laws"), [("softmax", CLIP_TEXT), ("sigmoid", BIG_VISION_TEXT)])
def test_text_towers_start_as_published(loss, laws):
    assert differing(build(clip, "clip", **SMALL, loss=loss).text, laws) == []


def test_the_pooling_of_siglip_starts_as_published():
    args = VIT["encoder_args"] | {"class_token": False, "global_pool": "map"}
    model = build(clip, "clip", **SMALL, loss="sigmoid", encoder_args=args)
    laws = BIG_VISION | {"latent": ("uniform", math.sqrt(6 / (1 + D))), "q.weight": xavier(D, D), "q.bias": ZERO}
    laws |= {"kv.weight": xavier(D, D), "kv.bias": ZERO}
    laws |= {"attn_pool.proj.weight": xavier(D, D), "attn_pool.proj.bias": ZERO}
    found = differing(backbone(model), laws)
    assert found == []


def moco_positions(rows: int, columns: int, dim: int) -> np.ndarray:
    """As moco-v3's ``build_2d_sincos_position_embedding`` has it for a square; [1+N,dim]."""
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim // 4))
    table = [np.zeros(dim)]
    for row in range(rows):
        for column in range(columns):
            first, second = row * omega, column * omega
            table.append(np.concatenate([np.sin(first), np.cos(first), np.sin(second), np.cos(second)]))
    return np.stack(table)


@pytest.mark.parametrize("case", ["moco 2", "moco 3", "simclr"])
def test_positions_of_mocos_transformers_are_fixed_sines_and_cosines(case):
    module, settings, _ = CASES[case]
    model = build(module, case, **settings)
    table = backbone(model).pos_embed
    assert not table.requires_grad
    np.testing.assert_allclose(table[0].numpy(), moco_positions(2, 3, D), atol=1e-6)


def test_the_first_scale_of_residual_branches_is_one_in_version_two_and_zero_in_version_three():
    resnet: dict[str, Any] = {"encoder": "resnet18", "encoder_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}}
    for version, scale in ((2, 1.0), (3, 0.0)):
        for block in backbone(build(moco, "moco", **resnet, version=version, queue=4)).layer1:
            assert bool((block.bn2.weight == scale).all()) and bool((block.bn1.weight == 1).all())


def test_initial_weights_that_the_user_chooses_stay_and_other_networks_are_left_alone():
    chosen = EncoderConfig(**VIT | {"encoder_args": VIT["encoder_args"] | {"weight_init": ""}})
    torch.manual_seed(0)
    kept = construct_encoder(chosen, SIZE, "test", start=start_as_clip).backbone
    assert float(kept.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    network = EncoderConfig(encoder="mobilenetv3_small_050")
    states = []
    for start in (None, start_as_clip, start_as_moco):
        torch.manual_seed(0)
        states.append(construct_encoder(network, (32, 32), "test", start=start).state_dict())
    assert all(torch.equal(value, other[name]) for other in states[1:] for name, value in states[0].items())
