"""Codes that move by what all ranks see, dead ones that start anew the same everywhere, rates, and what is refused."""

import math

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.objectives.vq_vae import VQVAE, Config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
NETWORK = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent": 3}
STATE = ("quantiser.weight", "quantiser.sums", "quantiser.counts")


def build(size=(8, 8), **settings):
    torch.manual_seed(0)
    return VQVAE(Config(**{"network": NETWORK, "codes": 12} | settings), DataFacts(size, ()))


def batch(samples=8, first=0):
    image = torch.randint(0, 256, (samples, 3, 8, 8), generator=torch.Generator().manual_seed(first))
    ids = torch.arange(first, first + samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


def taught(folder):
    """Codes after a few updates on this rank's share, in two micro-batches; saved for the test of both."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(revive=3.0, decay=0.8)
    share = 8 // world
    for step in range(4):
        mine = {name: value[rank * share : (rank + 1) * share] for name, value in batch(first=8 * step).items()}
        for half in (slice(0, share // 2), slice(share // 2, None)):
            model({name: value[half] for name, value in mine.items()}, CTX)
        model.after_step(Clock(step + 1, 8 * (step + 1), 1000))
    torch.save(model.state_dict(), folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("codes")


def test_one_rank_moves_codes(folder, lone_group):
    taught(folder)


@pytest.mark.world_size(2)
def test_two_ranks_move_codes(folder):
    with process_group(timeout_minutes=1):
        taught(folder)


def test_ranks_have_the_same_codes_at_any_number(folder):
    alone, *others = (torch.load(folder / f"{part}.pt") for part in ("1-0", "2-0", "2-1"))
    fresh = build(revive=3.0, decay=0.8).state_dict()
    for name in STATE:
        assert torch.equal(others[0][name], others[1][name])
        torch.testing.assert_close(others[0][name], alone[name], rtol=1e-4, atol=1e-5)
    assert (alone["quantiser.weight"] != fresh["quantiser.weight"]).any(dim=1).all()


def test_the_rate_is_that_of_codes_all_as_likely():
    model = build()
    output = model(batch(), CTX)
    rate = output.metrics["bits_per_dim_bound"] - output.metrics["distortion"]
    assert float(rate) == pytest.approx(16 * math.log2(12) / 192, rel=1e-5)
    assert float(output.loss.detach()) > float(output.metrics["distortion"])


def test_evaluation_moves_nothing():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    model(batch(), StepContext(seed=1, clock=Clock(0, 0, 100), training=False))
    model.encoders()["image"](batch()["image"])
    model.showcase(batch(), CTX)
    assert not model.quantiser._fresh and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("quantiser", ["average", "gradient", "scalar"])
def test_training_makes_codes_tell_of_the_image(quantiser, lone_group):
    """Images of one of four colours: one answer for all would be 73 values off."""
    settings = {"scalar": {"levels": (4, 4, 4)}, "average": {"revive": 0.1}, "gradient": {}}[quantiser]
    model = build(quantiser=quantiser, decay=0.9, **settings)
    colours = torch.tensor([[20, 200, 90], [230, 30, 160], [120, 120, 10], [60, 250, 240]])
    image = colours[torch.arange(16) % 4][:, :, None, None].expand(16, 3, 8, 8).to(torch.uint8)
    data = {"image": image, "id": torch.arange(16), "epoch": torch.zeros(16, dtype=torch.int64)}
    rate, steps = (1e-2, 120) if quantiser == "scalar" else (3e-3, 60)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        output = model(data, CTX)
        output.loss.backward()
        optimizer.step()
        model.after_step(Clock(step + 1, 16, 1000))
    decoded = model.pixels.image(model.model.decode(model.encode(image)[1].z)).float()
    assert float((decoded - image).abs().mean()) < 30
    assert float(output.metrics["perplexity"]) > 2


def test_settings_that_do_not_go_together_are_named():
    for settings, message in (
        ({"quantiser": "scalar"}, "set both or neither"),
        ({"levels": (5, 5, 5)}, "set both or neither"),
        ({"quantiser": "scalar", "levels": (5, 5)}, "2 levels for network.latent = 3"),
        ({"quantiser": "scalar", "levels": (5, 5, 5), "cosine": True}, "codes that are learned"),
        ({"quantiser": "gradient", "revive": 1.0}, "moving averages"),
    ):
        with pytest.raises(ValidationError, match=message):
            Config(**{"network": NETWORK} | settings)
