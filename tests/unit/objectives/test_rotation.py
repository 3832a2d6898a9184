"""Rotation prediction: the four positions, and the loss by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.objectives.rotation import Config, Rotation, turned

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(size: tuple[int, int] = (32, 32), **settings: Any) -> Rotation:
    torch.manual_seed(0)
    return Rotation(Config(**{"encoder": "vit_tiny_patch16_224", "encoder_args": VIT} | settings), DataFacts(size, ()))


def batch(samples: int = 3) -> Batch:
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(5))
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def test_the_positions_are_quarter_turns_against_the_clock():
    """Of each channel: transposed and turned upside down, upside down and mirrored, and turned and transposed."""
    image = batch()["image"]
    copies = turned(image).chunk(4)
    for copy, plain in zip(copies, image.expand(4, -1, -1, -1, -1), strict=True):
        assert copy.shape == plain.shape
    for sample, one in enumerate(image.numpy()):
        expected = [one, one.transpose(0, 2, 1)[:, ::-1], one[:, ::-1, ::-1], one[:, ::-1].transpose(0, 2, 1)]
        for copy, turn in zip(copies, expected, strict=True):
            np.testing.assert_array_equal(copy[sample].numpy(), turn)


def test_the_loss_is_the_mean_over_all_four_copies():
    model, data = build().eval(), batch()
    out = model(data, CTX)
    losses, hits = np.zeros(3), 0
    with torch.no_grad():
        for sample in range(3):
            for turn in range(4):
                copy = np.rot90(data["image"][sample].numpy(), turn, (1, 2)).copy()
                logits = model.head(model.encoder(torch.from_numpy(copy)[None]))[0].double()
                losses[sample] += float(logits.logsumexp(0) - logits[turn]) / 4
                hits += int(logits.argmax()) == turn
    assert out.losses is not None and out.features is not None
    np.testing.assert_allclose(out.losses.numpy(), losses, rtol=1e-5)
    assert float(out.loss.detach()) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(out.metrics["top1"]) == pytest.approx(hits / 12)
    torch.testing.assert_close(out.features, model.encoder(data["image"]).detach())


def test_images_that_cannot_be_turned_are_refused():
    with pytest.raises(ConfigError, match="32x48 cannot be turned"):
        build((32, 48))


class Sure(nn.Module):
    """Takes the third image, turned by half, to be turned by three quarters."""

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.eye(4)[[0, 1, 3]]


def test_the_picture_says_what_is_told_rightly():
    model = build().eval()
    model.encoder, model.head = nn.Identity(), Sure()  # type: ignore[assignment]
    shown = model.showcase(batch(), CTX)["rotation"]
    assert "67% are told rightly" in shown.caption
