"""SwAV's loss, with and without a queue, and its head, equal lightly's.

Lightly's prototypes have a bias, which the authors' code has not; here it is zero.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("lightly", reason="lightly is not installed: make parity")

from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

from pipeline.core.protocols import Clock, DataFacts, Embeddings, StepContext
from pipeline.objectives.swav import Config, SwAV

CTX = StepContext(0, Clock(0, 0, 1))
SAMPLES, CROPS, PROTOTYPES, DIM, QUEUE = 24, 5, 7, 16, 30
SIZES = ((32, 32), (32, 32), (16, 16), (16, 16), (16, 16))
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}


def both() -> tuple[SwAV, SwaVPrototypes]:
    """Ours and their prototypes, in the same directions."""
    torch.manual_seed(0)
    config = Config(
        encoder="resnet18", encoder_args=RESNET, dim=DIM, hidden=8, prototypes=PROTOTYPES, queue=QUEUE, queue_from=0
    )
    ours, theirs = SwAV(config, DataFacts((32, 32), (), views=SIZES)), SwaVPrototypes(DIM, PROTOTYPES)
    theirs.normalize()
    linear = theirs.heads[0]
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.bias)
    ours.prototypes.weight.data.copy_(3 * linear.weight.data)
    return ours, theirs


@pytest.mark.parametrize("full", [False, True])
def test_the_loss_is_lightlys(full, lone_group):
    ours, theirs = both()
    z = functional.normalize(torch.randn(CROPS, SAMPLES, DIM), dim=2)
    queue = functional.normalize(torch.randn(QUEUE, 2, DIM), dim=2)
    ours.queue.copy_(queue)
    ours.filled.fill_(QUEUE * full)
    rows = {"scores": ours.prototypes(z.transpose(0, 1)), "z": z[:2].transpose(0, 1), "features": z[0]}
    found = ours.loss(Embeddings(rows, ours.shared()), CTX).loss
    scores = [theirs(crop) for crop in z]
    queued = [theirs(queue[:, crop]) for crop in range(2)] if full else None
    expected = SwaVLoss()(scores[:2], scores[2:], queued)
    torch.testing.assert_close(found, expected.squeeze(), rtol=1e-6, atol=1e-6)


def test_the_head_is_lightlys():
    ours, _ = both()
    theirs = SwaVProjectionHead(8, 8, DIM).layers
    theirs.load_state_dict(ours.head.state_dict())
    x = torch.randn(6, 8)
    torch.testing.assert_close(ours.head.train()(x), theirs.train()(x))
