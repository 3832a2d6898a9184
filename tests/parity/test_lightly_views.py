"""BYOL, Barlow Twins, VICReg, DINO and iBOT against lightly: losses, head, schedule, on equal inputs and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline.core.protocols import Clock, DataFacts, Embeddings, StepContext
from pipeline.nn.dino_head import DINOHead
from pipeline.nn.followers import cosine_to_one
from pipeline.objectives import barlow_twins, byol, vicreg
from pipeline.objectives.dino import DINO
from pipeline.objectives.dino import Config as DINOConfig

lightly = pytest.importorskip("lightly", reason="needs the extra 'parity'")

CTX = StepContext(seed=0, clock=Clock(1, 100, 1000))
RESNET: dict[str, Any] = {
    "encoder": "resnet18",
    "encoder_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
    "hidden": 8,
    "dim": 6,
}
FACTS = DataFacts((32, 32), (), samples=100, views=((32, 32), (32, 32), (16, 16)))


def rows(names: tuple[str, ...], width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(10, width, generator=generator) + 2
    return {name: common + 0.3 * torch.randn(10, width, generator=generator) for name in names}


def test_barlow_twins_and_vicreg(lone_group):
    from lightly.loss import BarlowTwinsLoss, VICRegLoss

    z = rows(("embedding", "embedding2", "features"))
    for model, peer in (
        (barlow_twins.BarlowTwins(barlow_twins.Config(**RESNET), FACTS), BarlowTwinsLoss(lambda_param=0.0051)),
        (vicreg.VICReg(vicreg.Config(**RESNET), FACTS), VICRegLoss()),
    ):
        mine, theirs = ({n: x.clone().requires_grad_() for n, x in z.items()} for _ in range(2))
        loss = model.loss(Embeddings(mine, {}), CTX).loss
        expected = peer(theirs["embedding"], theirs["embedding2"])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        loss.backward()
        expected.backward()
        for name in ("embedding", "embedding2"):
            torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_byol_is_four_times_lightlys_and_its_target_follows_the_same_schedule(lone_group):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.utils.scheduler import cosine_schedule

    z = rows(("prediction", "prediction2", "target", "target2", "features"))
    unit = {name: functional.normalize(x, dim=1) for name, x in z.items()}
    loss = byol.BYOL(byol.Config(**RESNET), FACTS).loss(Embeddings(unit, {}), CTX).loss
    peer = NegativeCosineSimilarity()
    half = 0.5 * (peer(z["prediction"], z["target2"]) + peer(z["prediction2"], z["target"]))
    torch.testing.assert_close(loss, 4 + 4 * half)
    for step in (0, 30, 99):  # lightly's reaches its end in the last update
        assert cosine_to_one(0.996, step / 99) == pytest.approx(cosine_schedule(step, 100, 0.996, 1.0), abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # lightly's, of torch
def test_the_head_is_dinos(lone_group):
    from lightly.models.modules.heads import DINOProjectionHead

    torch.manual_seed(0)
    mine = DINOHead(5, hidden=8, bottleneck=4, prototypes=7, fixed_lengths=True)
    theirs = DINOProjectionHead(5, 8, 4, 7)
    with torch.no_grad():
        linear = [[m for m in head.layers if isinstance(m, torch.nn.Linear)] for head in (mine, theirs)]
        for a, b in zip(*linear, strict=True):
            assert a.weight.shape == b.weight.shape and float(b.bias.abs().sum()) == 0
            b.load_state_dict(a.state_dict())
        theirs.last_layer.weight_v.copy_(mine.last.direction)
    x = torch.randn(6, 5)
    torch.testing.assert_close(mine(x), theirs(x))
    wide = [
        DINOHead(64, hidden=128, bottleneck=64, prototypes=500, fixed_lengths=True),
        DINOProjectionHead(64, 128, 64, 500),
    ]
    start = [
        (float(h.layers[0].weight.detach().std()), float(v.detach().std()))
        for h, v in zip(wide, (wide[0].last.direction, wide[1].last_layer.weight_v), strict=True)
    ]
    assert start[0] == pytest.approx(start[1], rel=0.03)


def model_and_batch(**settings: Any) -> tuple[DINO, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": vit, "hidden": 12, "bottleneck": 6, "prototypes": 9}
    model = DINO(DINOConfig(**defaults | {"teacher_temperature": 0.04} | settings), FACTS).train()
    with torch.no_grad():
        for p in (*model.head.parameters(), *model.teacher.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    ids = torch.arange(6)
    images = {"image": (6, 3, 32, 32), "image2": (6, 3, 32, 32), "image3": (6, 3, 16, 16)}
    data = {name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in images.items()}
    return model, {"id": ids, "epoch": torch.zeros_like(ids), **data}


def test_dinos_loss_and_centre_over_several_updates(lone_group):
    from lightly.loss import DINOLoss

    model, data = model_and_batch()
    peer = DINOLoss(output_dim=9, teacher_temp=0.04, center_momentum=0.9)
    for step in range(3):
        ctx = StepContext(seed=0, clock=Clock(step, 100 * step, 1000))
        views = [model.view(data, ctx, name) for name in model.names]
        taught = [model.teacher["head"](model.teacher["encoder"](view)) for view in views[:2]]
        expected = peer(taught, [model.head(model.encoder(view)) for view in views])
        torch.testing.assert_close(model(data, ctx).loss, expected, rtol=1e-4, atol=1e-5)
        model.after_step(ctx.clock)
        torch.testing.assert_close(model.centre, peer.center.flatten(), rtol=1e-4, atol=1e-6)


def test_ibots_loss_of_patches(lone_group):
    from lightly.loss import IBOTPatchLoss

    model, data = model_and_batch(masked={"views": 0.8, "ratio": (0.2, 0.6), "teacher_temperature": 0.04})
    assert model.tokens is not None
    masks = model.tokens.draw(data, CTX, "dino.mask", model.names[:2])
    x = model.encoder.normalize(torch.cat([model.view(data, CTX, name) for name in model.names[:2]]))
    with torch.no_grad():
        taught = model.teacher["head"](model.teacher["encoder"].backbone(x)[:, 1:])
        with model.tokens.put(model.encoder.backbone, masks):
            mine = model.head(model.encoder.backbone(x)[:, 1:])
    peer = IBOTPatchLoss(output_dim=9, teacher_temp=0.04, student_temp=0.1)
    expected = peer(taught[masks.hidden], mine[masks.hidden], masks.hidden.view(-1, *model.tokens.grid))
    found = model(data, CTX).metrics["loss_patches"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
