"""SimCLR: the loss by hand, the head, the small stem, and batch norm over all ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.objectives.simclr import Config, SimCLR

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}


def build(**settings: Any) -> SimCLR:
    torch.manual_seed(0)
    defaults = {"encoder": "resnet18", "encoder_args": RESNET, "dim": 5}
    return SimCLR(Config(**defaults | settings), DataFacts((32, 32), ())).train()


def batch(samples: int = 4) -> Batch:
    images = torch.randint(
        0, 256, (2, samples, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.arange(samples)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images[0], "image2": images[1]}


def test_the_loss_is_the_mean_over_all_views_of_both_directions(lone_group):
    model = build(temperature=0.5)
    data = batch()
    with torch.no_grad():
        z = functional.normalize(model.head(model.encoder(model.views(data, CTX))), dim=1)
    similarity = z @ z.T / 0.5
    terms = [
        -(similarity[i, (i + 4) % 8].exp() / sum(similarity[i, k].exp() for k in range(8) if k != i)).log()
        for i in range(8)
    ]
    out = model(data, CTX)
    torch.testing.assert_close(out.loss.detach(), sum(terms) / 8, rtol=1e-5, atol=1e-6)
    agreement = sum(float(z[i] @ z[i + 4]) for i in range(4)) / 4
    assert float(out.metrics["agreement"]) == pytest.approx(agreement, abs=1e-5)


def test_the_sum_is_that_of_the_authors_code(lone_group):
    """mean(loss_a + loss_b): cross-entropies of first views against all others, and of second ones (objective.py)."""
    model, data = build(temperature=0.5, loss="sum"), batch()
    with torch.no_grad():
        first, second = functional.normalize(model.head(model.encoder(model.views(data, CTX))), dim=1).chunk(2)
    masked, here = torch.eye(4) * 1e9, torch.arange(4)
    loss_a = functional.cross_entropy(torch.cat([first @ second.T, first @ first.T - masked], 1) / 0.5, here)
    loss_b = functional.cross_entropy(torch.cat([second @ first.T, second @ second.T - masked], 1) / 0.5, here)
    torch.testing.assert_close(model(data, CTX).loss, loss_a + loss_b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_head_ends_in_a_norm_without_centre_and_every_norm_is_over_all_ranks(layers):
    model = build(layers=layers, hidden=7)
    linear = [m for m in model.head if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [8, *[7] * (layers - 1)] and linear[-1].out_features == 5
    assert all(m.bias is None for m in linear)
    last = model.head[-1]
    assert last.weight.requires_grad and not last.bias.requires_grad and not last.bias.any()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > layers and all(isinstance(m, GlobalBatchNorm) for m in norms)


def test_the_small_stem_keeps_the_resolution_and_needs_a_resnet():
    model = build(small_stem=True)
    stem = model.encoder.backbone
    assert stem.maxpool(stem.conv1(torch.zeros(1, 3, 32, 32))).shape[2:] == (32, 32)
    with pytest.raises(ConfigError, match="small_stem"):
        build(small_stem=True, encoder="vit_tiny_patch16_224", encoder_args={"depth": 1})


def test_what_is_dropped_belongs_to_the_sample(lone_group):
    args = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.5, "proj_drop_rate": 0.3}
    model = build(encoder="vit_tiny_patch16_224", encoder_args=args)
    model.head = nn.Identity()
    rows = model.embed(batch(), CTX)
    torch.manual_seed(9)
    part = model.embed({n: v[1:3] for n, v in batch().items()}, CTX)
    for name, value in rows.items():
        torch.testing.assert_close(part[name], value[1:3], rtol=1e-5, atol=1e-5)
    model.eval()
    assert not torch.allclose(model.embed(batch(), CTX)["first"], rows["first"], atol=1e-3)
