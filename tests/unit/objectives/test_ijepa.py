"""I-JEPA sample by sample, without anything that fills up; blocks by brute force; what its authors draw and keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.nn.masking import encode_visible
from pipeline.objectives.ijepa import IJEPA, Config, block_size

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
GRID = (8, 8)


def build(**settings: Any) -> IJEPA:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "predictor_dim": 8, "predictor_depth": 2}
    model = IJEPA(Config(**defaults | settings), DataFacts((32, 32), ())).train()
    with torch.no_grad():  # else positions alone decide, and both encoders are one
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(samples: int = 6) -> Batch:
    images = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(samples) + 30
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images}


def context(step: int = 0) -> StepContext:
    return StepContext(seed=4, clock=Clock(step, step * 6, 600))


def predicted_alone(model: IJEPA, seen: Tensor, keep: Tensor, wanted: Tensor) -> Tensor:
    """The predictor on one sample and one block, as the paper draws it: [M,D]."""
    p = model.predictor
    known = p.embed(seen) + p.positions[keep]
    asked = p.mask_token[0] + p.positions[wanted]
    x = torch.cat([known, asked])[None]
    for block in p.blocks:
        x = block(x)
    return p.predict(p.norm(x))[0, len(keep) :]


def test_the_loss_is_the_mean_over_samples_blocks_and_patches_each_by_itself():
    model, data, ctx = build(), batch(), context()
    parts = model.parts(data, ctx)
    assert len(set(parts.valid.sum(dim=1).tolist())) > 1  # so that something is filled up
    terms = []
    for i, image in enumerate(data["image"]):
        x = model.encoder.normalize(image[None])
        keep = parts.keep[i][parts.valid[i]]
        seen = encode_visible(model.encoder.backbone, x, keep[None])[0]
        with torch.no_grad():
            tokens = model.target.backbone(x)[0]
            known = (tokens - tokens.mean(1, keepdim=True)) / (
                tokens.var(1, keepdim=True, unbiased=False) + 1e-5
            ).sqrt()
        of_sample = []
        for wanted in parts.wanted[i]:
            off = (predicted_alone(model, seen, keep, wanted) - known[wanted]).abs()
            of_sample.append(torch.where(off < 1, off**2 / 2, off - 0.5).mean())
        terms.append(torch.stack(of_sample).mean())
    out = model(data, ctx)
    torch.testing.assert_close(out.losses, torch.stack(terms).detach(), rtol=1e-4, atol=1e-5)
    torch.stack(terms).mean().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out.loss.backward()
    for (name, p), want in zip(model.named_parameters(), expected, strict=True):
        assert (p.grad is None) == (want is None) == (not p.requires_grad), name
        if want is not None:
            torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6, msg=name)


def test_blocks_are_rectangles_of_one_size_and_the_context_holds_none_of_them():
    model, data = build(), batch(200)
    sizes = set()
    for step in range(12):
        parts = model.parts(data, context(step))
        blocks = torch.zeros(*parts.wanted.shape[:2], 64).scatter(2, parts.wanted, 1).view(-1, *GRID)
        rows, columns = blocks.amax(dim=2).sum(dim=1), blocks.amax(dim=1).sum(dim=1)
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 1  # of all samples
        assert torch.equal(blocks.sum(dim=(1, 2)), rows * columns)
        sizes.add((int(rows[0]), int(columns[0])))
        seen = torch.zeros(200, 64).scatter(1, parts.keep, parts.valid.float())
        union = blocks.view(200, 4, 64).amax(dim=1)
        assert not (seen * union).any() and int(parts.valid.sum(dim=1).min()) >= 1
        box = (seen + union).clamp_max(1).sum(dim=1)
        assert float(box.min()) >= 49 - 1e-6  # a context block and the targets
    assert len(sizes) > 1
    everywhere = torch.zeros(64).scatter(0, parts.wanted.flatten(), 1)
    assert everywhere.all()  # the last row and column, too
    few = {name: value[3:5] for name, value in data.items()}
    own = model.parts(few, context(11))
    assert torch.equal(own.wanted, parts.wanted[3:5])
    assert [own.keep[i][own.valid[i]].tolist() for i in (0, 1)] == [
        parts.keep[i][parts.valid[i]].tolist() for i in (3, 4)
    ]


@pytest.mark.parametrize("u", [0.0, 0.3, 0.77, 0.999])
def test_sizes_are_those_of_the_authors_code(u):
    """facebookresearch/ijepa, src/masks/multiblock.py, ``_sample_block_size``; no block is as wide as images."""
    for scale, ratio in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))):
        area = int(14 * 14 * (scale[0] + u * (scale[1] - scale[0])))
        form = ratio[0] + u * (ratio[1] - ratio[0])
        h, w = round(math.sqrt(area * form)), round(math.sqrt(area / form))
        assert block_size(u, scale, ratio, (14, 14)) == (min(h, 14), min(w, 14))
    assert block_size(0.0, (0.15, 0.2), (0.75, 1.5), (14, 14)) == (5, 6)
    assert block_size(0.999, (0.15, 0.2), (0.75, 1.5), (14, 14)) == (8, 5)


def test_targets_are_normalised_and_the_evaluated_encoder_is_the_target():
    model, data, ctx = build(), batch(), context()
    _, wanted, features = model.compare(data, ctx, model.parts(data, ctx))
    torch.testing.assert_close(wanted.mean(dim=-1), torch.zeros(6, 4, wanted.shape[2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(wanted.var(dim=-1, unbiased=False), torch.ones(6, 4, wanted.shape[2]), atol=1e-3, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(features, model.encoders()["image"](data["image"]))
    assert not wanted.requires_grad and not any(p.requires_grad for p in model.target.parameters())


def test_the_target_encoder_keeps_more_and_more_in_a_straight_line():
    model = build()
    keeps = [{m.keep for m in model.averages(Clock(0, n, 100))} for n in (0, 25, 100)]
    assert [keep for (keep,) in keeps] == pytest.approx([0.996, 0.997, 1.0])
    assert {id(m.target) for m in model.averages(Clock(0, 0, 1))} == {id(p) for p in model.target.parameters()}


def test_weights_start_as_the_authors_code_draws_them():
    torch.manual_seed(0)
    args = VIT | {"embed_dim": 64}
    model = IJEPA(Config(encoder="vit_tiny_patch16_224", encoder_args=args, predictor_dim=64), DataFacts((32, 32), ()))
    for name, p in model.named_parameters():
        if p.ndim > 1 and p.requires_grad and not name.endswith("mask_token"):
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1), name
        elif name.endswith(".bias"):
            assert not p.any(), name
    assert model.encoder.backbone.cls_token is None and model.encoder.backbone.pos_embed.shape == (1, 64, 64)
    for a, b in zip(model.encoder.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": 6}, r"6 blocks of up to 12 patches can cover the whole context, .* no more than 49 of 8x8"),
        ({"encoder": "resnet18", "encoder_args": {}}, "timm cannot build 'resnet18'"),
        ({"predictor_heads": 3}, "3 heads do not divide 8; set predictor_heads"),
    ],
)
def test_what_does_not_fit_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"target_scale goes from 0.3 down to 0.2"):
        Config(target_scale=(0.3, 0.2))
    with pytest.raises(ValueError, match="'checkpointing' is not possible here"):
        Config(checkpointing=True)
