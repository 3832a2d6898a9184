"""DINO and iBOT against their authors' losses, the head against torch's weight norm, centres over ranks and parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.nn.attention import class_attention
from pipeline.nn.dino_head import DINOHead
from pipeline.objectives.dino import DINO, Config
from tests.ranks import start_ranks

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZES = ((32, 32), (32, 32), (16, 16), (16, 16), (16, 16))
SAMPLES, PROTOTYPES = 8, 12
CTX = StepContext(seed=5, clock=Clock(3, 300, 2000))


def build(sizes: tuple[tuple[int, int], ...] = SIZES, **settings: Any) -> DINO:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "hidden": 12, "bottleneck": 6}
    defaults |= {"prototypes": PROTOTYPES, "teacher_warmup": "10ep"}
    model = DINO(Config(**defaults | settings), DataFacts(sizes[0], (), samples=60, views=sizes)).train()
    with torch.no_grad():  # else teacher and student agree, and all is near to even
        for p in (*model.head.parameters(), *model.teacher.parameters()):
            p.add_(0.2 * torch.randn_like(p))
        model.centre.copy_(0.1 * torch.randn(PROTOTYPES))
        if model.tokens is not None:
            model.tokens.token.copy_(torch.randn_like(model.tokens.token))
            model.patch_centre.copy_(0.1 * torch.randn(PROTOTYPES))
    return model


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(SAMPLES) + 40
    images = {
        "image" + (str(n + 1) if n else ""): torch.randint(
            0, 256, (SAMPLES, 3, *size), dtype=torch.uint8, generator=generator
        )
        for n, size in enumerate(SIZES)
    }
    return {"id": ids, "epoch": torch.zeros_like(ids), **images}


def answers(model: DINO, data: Batch, teacher: bool, names: list[str]) -> list[Tensor]:
    """Each crop by itself."""
    encoder, head = (model.teacher["encoder"], model.teacher["head"]) if teacher else (model.encoder, model.head)
    return [head(encoder(model.view(data, CTX, name))) for name in names]


def test_the_loss_is_that_of_the_authors_code(lone_group):
    """facebookresearch/dino, main_dino.py, ``DINOLoss.forward``; the warm-up is 600 samples, of which 300 are seen."""
    model, data = build(), batch()
    sharp = 0.04 + (0.07 - 0.04) / 2
    with torch.no_grad():
        wanted = [((t - model.centre) / sharp).softmax(-1) for t in answers(model, data, True, model.names[:2])]
    student = answers(model, data, False, model.names)
    terms = [
        -(q * (s / 0.1).log_softmax(-1)).sum(-1).mean()
        for i, q in enumerate(wanted)
        for j, s in enumerate(student)
        if i != j
    ]
    assert len(terms) == 8
    out = model(data, CTX)
    torch.testing.assert_close(out.loss, sum(terms) / 8, rtol=1e-5, atol=1e-5)
    entropy = -torch.stack(wanted).clamp_min(1e-30).log().mul(torch.stack(wanted)).sum(-1).mean()
    torch.testing.assert_close(out.metrics["entropy"], entropy, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("shape", ["block", "random"])
def test_ibots_loss_is_that_of_its_code(shape, lone_group):
    """bytedance/ibot, main_ibot.py, ``iBOTLoss.forward``, on all patches; one temperature of patches is another."""
    masked = {"shape": shape, "views": 0.7, "ratio": (0.1, 0.6), "weight": 3.0, "teacher_temperature": 0.06}
    model, data = build(masked=masked), batch()
    assert model.tokens is not None
    masks = model.tokens.draw(data, CTX, "dino.mask", model.names[:2]).hidden.chunk(2)
    embed = model.encoder.backbone.patch_embed
    wanted, mine = [], []
    for name, hidden in zip(model.names[:2], masks, strict=True):
        x = model.encoder.normalize(model.view(data, CTX, name))
        with torch.no_grad():
            tokens = model.teacher["head"](model.teacher["encoder"].backbone(x))
            first = ((tokens[:, 0] - model.centre) / 0.055).softmax(-1)
            wanted.append((first, ((tokens[:, 1:] - model.patch_centre) / 0.05).softmax(-1)))
        patches = embed(x).flatten(1, 2)
        patches[hidden] = model.tokens.token.flatten()
        handle = embed.register_forward_hook(lambda m, i, o, patches=patches: patches.view(o.shape))
        mine.append(model.head(model.encoder.backbone(x)))
        handle.remove()
    small = answers(model, data, False, model.names[2:])
    of_class, of_patches = [], []
    for i, (first, patches) in enumerate(wanted):
        for j, student in enumerate([m[:, 0] for m in mine] + small):
            if i != j:
                of_class.append(-(first * (student / 0.1).log_softmax(-1)).sum(-1).mean())
        loss = -(patches * (mine[i][:, 1:] / 0.1).log_softmax(-1)).sum(-1) * masks[i]
        of_patches.append((loss.sum(-1) / masks[i].sum(-1).clamp(min=1)).mean())
    out = model(data, CTX)
    expected = sum(of_class) / 8 + 3 * sum(of_patches) / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.metrics["loss_patches"], (sum(of_patches) / 2).detach(), rtol=1e-4, atol=1e-4)


def centres() -> dict[str, np.ndarray]:
    """After an update of two micro-batches a rank, after a step that was given up."""
    with process_group(1.0) as place:
        model = build(masked={"ratio": (0.2, 0.5)})
        mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch().items()}
        model({n: v[:1] for n, v in mine.items()}, StepContext(seed=5, clock=Clock(2, 200, 2000)))
        for part in range(2):
            model({n: v.chunk(2)[part] for n, v in mine.items()}, CTX)
        model.after_step(CTX.clock)
        return {"centre": model.centre.numpy(), "patch_centre": model.patch_centre.numpy()}


@pytest.mark.parametrize("world", [1, 2])
def test_centres_follow_the_mean_of_the_global_batch_once_per_update(world):
    ended = start_ranks(world, centres)
    assert [e.problem for e in ended] == [None] * world
    model, data = build(masked={"ratio": (0.2, 0.5)}), batch()
    with torch.no_grad():
        x = torch.cat([model.encoder.normalize(model.view(data, CTX, name)) for name in model.names[:2]])
        tokens = model.teacher["head"](model.teacher["encoder"].backbone(x))
    expected = {
        "centre": 0.9 * model.centre + 0.1 * tokens[:, 0].mean(dim=0),
        "patch_centre": 0.9 * model.patch_centre + 0.1 * tokens[:, 1:].mean(dim=(0, 1)),
    }
    for end in ended:
        for name, want in expected.items():
            assert not np.allclose(want, getattr(model, name), atol=1e-3)
            np.testing.assert_allclose(end.value[name], want.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("fixed", [True, False])
def test_the_head_is_weight_normalised_as_torchs_own(fixed):
    torch.manual_seed(1)
    head = DINOHead(5, hidden=8, bottleneck=4, prototypes=7, fixed_lengths=fixed)
    last = nn.Linear(4, 7, bias=False)
    last.weight.data.copy_(head.last.direction.data)
    plain = nn.utils.parametrizations.weight_norm(last)
    plain.parametrizations.weight.original0.data.fill_(1)
    if not fixed:
        lengths = torch.rand(7, 1) + 0.5
        head.last.length.data.copy_(lengths)
        plain.parametrizations.weight.original0.data.copy_(lengths)
    x = torch.randn(6, 5)
    expected, found = plain(functional.normalize(head.layers(x), dim=-1)), head(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(6, 7)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(head.last.direction.grad, plain.parametrizations.weight.original1.grad)
    assert (head.last.length.grad is None) == fixed
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [type(layer).__name__ for layer in head.layers] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert all(not layer.bias.any() and (layer.weight.abs() < 0.1).all() for layer in linear)
    start = DINOHead(5, hidden=8, bottleneck=64, prototypes=200, fixed_lengths=fixed).last
    assert float(start.direction.detach().norm(dim=1).mean()) == pytest.approx(3**-0.5, abs=0.02)
    assert torch.equal(start.length, torch.ones(200, 1))


def test_the_teacher_sharpens_less_and_less_and_keeps_more_and_more():
    model = build()
    seen = [model._warm(Clock(0, samples, 2000)) for samples in (0, 150, 600, 2000)]
    assert seen == pytest.approx([0.0, 0.25, 1.0, 1.0])
    assert build(teacher_warmup="50%")._warm(Clock(0, 500, 2000)) == 0.5
    assert build(teacher_warmup="0ep")._warm(Clock(0, 0, 2000)) == 1.0
    keeps = [{m.keep for m in model.averages(Clock(0, samples, 2000))} for samples in (0, 1000, 2000)]
    assert [keep for (keep,) in keeps] == pytest.approx([0.996, 0.998, 1.0])
    targets = {id(m.target) for m in model.averages(Clock(0, 0, 1))}
    assert targets == {id(p) for p in model.teacher.parameters()}


def test_masks_have_the_size_that_was_asked_for_and_belong_to_the_view():
    model = build(masked={"shape": "block", "views": 0.5, "ratio": (0.25, 0.5)}, sizes=((64, 64),) * 2)
    ids = torch.arange(400)
    data = {"id": ids, "epoch": torch.zeros_like(ids)}
    assert model.tokens is not None
    masks = model.tokens.draw(data, CTX, "m", ["image", "image2"])
    counts = masks.hidden.sum(dim=1)
    assert set(counts[counts > 0].tolist()) == set(range(16, 32)) and 0.42 < float((counts > 0).float().mean()) < 0.58
    assert not torch.equal(*masks.hidden.chunk(2))
    for hidden, index, weights in zip(*masks, strict=True):
        count = int(hidden.sum())
        assert (
            set(index[:count].tolist()) == set(hidden.nonzero().flatten().tolist()) and len(set(index.tolist())) == 32
        )
        assert weights.tolist() == pytest.approx([1 / max(count, 1)] * count + [0.0] * (32 - count))
    few = {name: value[7:9] for name, value in data.items()}
    assert torch.equal(model.tokens.draw(few, CTX, "m", ["image2"]).hidden, masks.hidden[407:409])
    grids = masks.hidden[counts > 0].view(-1, 8, 8)  # rectangles: a masked patch mostly has a masked neighbour
    beside = (grids[:, :, 1:] & grids[:, :, :-1]).sum() / grids[:, :, 1:].sum()
    assert float(beside) > 0.6


def test_evaluation_sees_the_teacher_which_drops_nothing():
    model = build(encoder_args=VIT | {"drop_path_rate": 0.5})
    assert model.encoders()["image"] is model.teacher["encoder"]
    rates = {m.p for m in model.teacher.modules() if type(m).__name__ == "SampleDropout"}
    assert rates == {0.0} and 0.5 in {m.p for m in model.encoder.modules() if type(m).__name__ == "SampleDropout"}
    assert not any(p.requires_grad for p in model.teacher.parameters())
    fresh = DINO(model.config, DataFacts((32, 32), (), views=SIZES))
    for name in ("encoder", "head"):
        mine, theirs = getattr(fresh, name).state_dict(), fresh.teacher[name].state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_attention_is_that_of_the_block():
    model = build()
    backbone = model.encoder.backbone.eval()
    x = torch.randn(2, 3, 32, 32)
    given = []
    handle = backbone.blocks[-1].norm1.register_forward_hook(lambda m, i, o: given.append(o))
    backbone(x)
    handle.remove()
    attn = backbone.blocks[-1].attn
    q, k, _ = attn.qkv(given[0]).chunk(3, dim=-1)
    weights = torch.stack(
        [
            (q[:, :1, s] @ k[:, :, s].transpose(1, 2) * 8**-0.5).softmax(-1)[:, 0, 1:]
            for s in (slice(0, 8), slice(8, 16))
        ]
    )
    torch.testing.assert_close(class_attention(backbone, x), weights.mean(dim=0).detach())
    assert class_attention(nn.Linear(2, 2), x) is None


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (((32, 32),), {}, "compares two large crops, and the data gives 32x32; set data.image.views = 2"),
        (((32, 32), (16, 16)), {}, "the data gives 32x32, 16x16"),
        (((32, 32), (32, 32), (20, 20)), {}, r"20x20 does not fit the encoder's patches of 8x8"),
        (SIZES, {"encoder": "resnet18", "encoder_args": {}, "masked": {}}, "no patches and class token"),
        (SIZES, {"masked": {"ratio": (0.0, 0.05)}}, "is no patch"),
    ],
)
def test_what_does_not_fit_is_said(sizes, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(sizes, **settings)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="write epochs, samples or a part of the run"):
        Config(teacher_warmup="100ba")
    with pytest.raises(ValueError, match=r"ratio goes from 0.5 down to 0.1"):
        Config.model_validate({"masked": {"ratio": (0.5, 0.1)}})
