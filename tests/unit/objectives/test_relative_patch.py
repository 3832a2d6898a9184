"""Relative patch location: which tiles are compared, the loss by hand, and encoders on tiles and whole images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.nn.encoder import EncoderConfig, create_backbone
from pipeline.objectives.relative_patch import PLACES, Config, RelativePatch

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(**settings: Any) -> RelativePatch:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "hidden": 6, "head_norm": False}
    defaults |= {"tiles": {"size": 8, "jitter": 2, "colour": "drop"}}
    return RelativePatch(Config(**defaults | settings), DataFacts((32, 32), ()))


def batch(samples: int = 3) -> Batch:
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(5))
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def test_the_loss_is_that_of_all_eight_neighbours_of_the_middle():
    model, data = build(), batch()
    out, tiles = model(data, CTX), model.tiles(data, CTX)
    losses, hits = np.zeros(3), 0
    with torch.no_grad():
        for sample in range(3):
            each = [model.encoder.features(tiles[sample, tile][None])[0] for tile in range(9)]
            for place, tile in enumerate((0, 1, 2, 3, 5, 6, 7, 8)):
                logits = model.head(torch.cat([each[4], each[tile]])[None])[0].double()
                losses[sample] += float(logits.logsumexp(0) - logits[place]) / 8
                hits += int(logits.argmax()) == place
    assert out.losses is not None and out.features is not None
    np.testing.assert_allclose(out.losses.numpy(), losses, rtol=1e-5)
    assert float(out.metrics["top1"]) == pytest.approx(hits / 24)
    middle = model.encoder.features(tiles[:, 4]).detach()
    torch.testing.assert_close(out.features, middle, rtol=1e-4, atol=1e-5)


def test_what_the_encoder_is_given_has_lost_its_colours():
    """Of each tile, one channel as it was, and noise of a hundredth for the others."""
    model, data = build(), batch()
    spread = model.tiles(data, CTX).std(dim=(3, 4))
    assert ((spread < 0.02).sum(dim=2) == 2).all() and ((spread > 0.5).sum(dim=2) == 1).all()
    later = model.tiles(data | {"epoch": data["epoch"] + 1}, CTX).std(dim=(3, 4))
    assert not torch.equal(later.argmax(dim=2), spread.argmax(dim=2)), "others in each epoch"


class Means(nn.Module):
    """The mean of each tile, and nothing else."""

    def features(self, tiles: Tensor) -> Tensor:
        return tiles.mean(dim=(2, 3))[:, :1]


def test_places_are_named_as_they_lie():
    """An image that is darker towards the upper left; a head that knows only how bright a neighbour is."""
    model = build(tiles={"size": 8})
    row, column = torch.meshgrid(torch.arange(30) // 10, torch.arange(30) // 10, indexing="ij")
    normal, model.encoder = model.encoder.normalize, Means()  # type: ignore[assignment]
    model.encoder.normalize = normal
    levels = torch.tensor([0, 1, 2, 3, 9, 4, 5, 6, 7])
    brightness = levels[row * 3 + column].to(torch.uint8)[None, None].expand(1, 3, -1, -1) * 20
    lowest = float(normal(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0, 0])
    step = float(normal(torch.full((1, 3, 1, 1), 20, dtype=torch.uint8))[0, 0]) - lowest
    seen: list[float] = []

    class Head(nn.Module):
        def forward(self, both: Tensor) -> Tensor:
            assert torch.allclose(both[:, 0], torch.tensor(lowest + 9 * step))  # the middle, each time
            seen.extend(((both[:, 1] - lowest) / step).tolist())
            return -((both[:, 1:] - lowest) / step - torch.arange(8)).square()

    model.head = Head()  # type: ignore[assignment]
    ids = torch.zeros(1, dtype=torch.int64)
    out = model({"image": brightness, "id": ids, "epoch": ids}, CTX)
    assert seen == pytest.approx(range(8), abs=1e-4) and float(out.metrics["top1"]) == 1
    assert PLACES[0] == "above left" and PLACES[3:5] == ("left", "right") and PLACES[6] == "below"


def test_on_whole_images_a_transformer_is_what_it_would_be_without_tiles():
    model = build().eval()
    plain = create_backbone(EncoderConfig(encoder="vit_tiny_patch16_224", encoder_args=VIT), (32, 32)).eval()
    plain.load_state_dict(model.encoder.backbone.state_dict())
    image = batch()["image"]
    with torch.no_grad():
        torch.testing.assert_close(model.encoders()["image"](image), plain(model.encoder.normalize(image)))


def test_a_transformer_that_cannot_take_such_tiles_is_refused():
    with pytest.raises(ConfigError, match="cannot take tiles of 7x7 pixels"):
        build(tiles={"size": 7})
    with pytest.raises(ConfigError, match="need cells of 12"):
        build(tiles={"size": 8, "jitter": 4})
