"""Jigsaw puzzles: how they are shuffled, what the head is given, and how they are put together."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.objectives.jigsaw import Config, Jigsaw

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(**settings: Any) -> Jigsaw:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "hidden": 6, "tile_dim": 5}
    defaults |= {"head_norm": False, "permutations": 12, "tiles": {"size": 8, "jitter": 2}}
    return Jigsaw(Config(**defaults | settings), DataFacts((32, 32), ()))


def batch(samples: int = 4) -> Batch:
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(5))
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def numbered(samples: int) -> Batch:
    """Images whose nine cells hold the number of the cell."""
    cell = (torch.arange(30) // 10)[:, None] * 3 + torch.arange(30) // 10
    image = cell.to(torch.uint8).expand(samples, 3, -1, -1)
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def test_a_place_holds_the_tile_that_the_permutation_says():
    model = build()
    tiles, which = model.puzzles(numbered(300), CTX)
    found = model.encoder.normalize.invert(tiles)[:, :, 0, 4, 4].long()
    assert torch.equal(found, model.permutations[which])
    assert set(which.tolist()) == set(range(12)) and int(which.bincount().max()) < 50


def test_what_the_encoder_is_given_has_lost_its_colours_brightness_and_contrast():
    """Channels of a grey tile differ in nothing but scale and place, which its own statistics take away."""
    tiles, _ = build(tiles={"size": 8, "grey": 1.0, "standardise": True}).puzzles(batch(), CTX)
    assert tiles.mean(dim=(3, 4)).abs().max() < 1e-5 and tiles.std(dim=(3, 4)).min() > 0.9
    torch.testing.assert_close(tiles[:, :, 1:], tiles[:, :, :1].expand(-1, -1, 2, -1, -1), rtol=1e-3, atol=1e-3)


def test_permutations_are_drawn_anew_in_each_epoch_and_belong_to_the_sample():
    model, data = build(), batch()
    _, which = model.puzzles(data, CTX)
    tiles, alone = model.puzzles({name: value[2:3] for name, value in data.items()}, CTX)
    assert alone[0] == which[2] and torch.equal(tiles[0], model.puzzles(data, CTX)[0][2])
    later = [model.puzzles(data | {"epoch": data["epoch"] + n}, CTX)[1] for n in range(4)]
    assert len({tuple(each.tolist()) for each in later}) > 1


def test_the_loss_of_all_tiles_in_their_shuffled_order():
    model, data = build(), batch()
    out = model(data, CTX)
    tiles, which = model.puzzles(data, CTX)
    losses, hits = [], 0
    with torch.no_grad():
        for sample in range(4):
            each = [model.each(model.encoder.features(tiles[sample, place][None]))[0] for place in range(9)]
            assert all((one >= 0).all() for one in each)
            logits = model.head(torch.cat(each)[None])[0].double()
            losses.append(float(logits.logsumexp(0) - logits[which[sample]]))
            hits += int(logits.argmax()) == int(which[sample])
    assert out.losses is not None and out.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert float(out.metrics["top1"]) == pytest.approx(hits / 4)


def test_a_puzzle_that_is_solved_is_shown_as_the_image_was():
    model, data = build(tiles={"size": 8}), numbered(6)
    _, which = model.puzzles(data, CTX)
    model.logits = lambda features: torch.eye(12)[which]  # type: ignore[method-assign]
    shown = model.showcase(data, CTX)["puzzles"]
    assert shown.caption.startswith("6 of 6 puzzles are solved")
    rows = np.split(shown.image[: 3 * (shown.image.shape[0] // 3)], 3)
    solved = rows[2][20:80, 6:64, 0].astype(int)
    assert solved[5, 5] < solved[5, -5] < solved[-5, -5] < 20
    assert (rows[1][20:80] != rows[2][20:80]).any(), "puzzles are shuffled"


def test_every_norm_of_the_head_is_over_all_ranks():
    from torch.nn.modules.batchnorm import _BatchNorm

    from pipeline.nn.batch_norm import GlobalBatchNorm

    norms = [m for m in build(head_norm=True).modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 2 and all(isinstance(m, GlobalBatchNorm) for m in norms)
