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


CRITIC = {"network": {"name": "patch", "channels": 4, "layers": 1, "norm": False}, "weight": 0.7}
AUTOENCODER = StepContext(seed=1, clock=Clock(0, 0, 100), phase="autoencoder")


def heard(folder):
    """The ratio of gradients of this rank's share, in two micro-batches; saved for the tests below."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, share = build(critic=CRITIC), 8 // world
    mine = {name: value[rank * share : (rank + 1) * share] for name, value in batch().items()}
    for half in (slice(0, share // 2), slice(share // 2, None)):
        model({name: value[half] for name, value in mine.items()}, AUTOENCODER)
    model.after_step(Clock(1, 8, 1000))
    torch.save(model.critic.ratio, folder / f"ratio-{world}-{rank}.pt")


def test_one_rank_weighs_its_critic(folder, lone_group):
    heard(folder)


@pytest.mark.world_size(2)
def test_two_ranks_weigh_their_critic(folder):
    with process_group(timeout_minutes=1):
        heard(folder)


def test_the_critics_weight_is_the_papers_over_all_ranks_and_micro_batches(folder):
    model, data = build(critic=CRITIC), batch()
    decoded = model.model.decode(model.encode(data["image"])[1].z)
    distortion = -model.pixels.log_likelihood(data["image"], decoded, None).mean() / (192 * math.log(2))
    last = model.model.decoder.conv_out.weight
    (of_distortion,) = torch.autograd.grad(distortion, last, retain_graph=True)
    (of_critic,) = torch.autograd.grad(-model.critic.critic(decoded).scores.mean(), last)
    expected = (of_distortion.norm() / (of_critic.norm() + 1e-4)).clamp(0, 1e4)
    assert 0 < float(expected) < 1e4
    for part in ("1-0", "2-0", "2-1"):
        torch.testing.assert_close(torch.load(folder / f"ratio-{part}.pt")[0], expected, rtol=1e-4, atol=0)


def test_the_critic_is_heard_with_its_weight_once_the_ratio_is_known():
    model, data = build(critic=CRITIC), batch()
    first = model(data, AUTOENCODER)
    assert float(first.metrics["ratio"]) == 0 == float(first.metrics["adversarial"])
    model.critic.ratio.fill_(3.0)
    again = model(data, AUTOENCODER)
    decoded = model.model.decode(model.encode(data["image"])[1].z)
    expected = 0.7 * 3 * -model.critic.critic(decoded).scores.mean(dim=1)
    torch.testing.assert_close(again.losses - first.losses, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_critics_loss_is_the_hinge_of_images_and_what_is_decoded():
    model, data = build(critic=CRITIC), batch()
    output = model(data, StepContext(seed=1, clock=Clock(0, 0, 100), phase="critic"))
    decoded = model.model.decode(model.encode(data["image"])[1].z)
    real, fake = (model.critic.critic(x).scores for x in (data["image"] / 127.5 - 1, decoded))
    expected = ((1 - real).clamp(min=0).mean(1) + (1 + fake).clamp(min=0).mean(1)) / 2
    torch.testing.assert_close(output.losses, expected.detach())
    output.loss.backward()
    assert all(p.grad is None for p in model.model.parameters())
    assert not model.quantiser._fresh


def test_before_its_start_the_critic_is_neither_heard_nor_moved():
    model, data = build(critic=CRITIC | {"start": 5}), batch()
    model.critic.ratio.fill_(3.0)
    for phase in ("autoencoder", "critic"):
        output = model(data, StepContext(seed=1, clock=Clock(4, 0, 100), phase=phase))
        output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.critic.parameters())
    later = model(data, StepContext(seed=1, clock=Clock(5, 0, 100), phase="critic"))
    assert float(later.loss.detach()) > 0.5


def test_without_a_critic_there_are_no_phases():
    assert build().phases() == {}
    assert list(build(critic=CRITIC).phases()) == ["autoencoder", "critic"]
