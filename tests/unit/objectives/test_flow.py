"""Bits per dimension against closed forms, what is made, how actnorm begins, and what is refused."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.evaluation import Likely
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.nn.generative.invertible import ActNorm, Coded
from pipeline.objectives.flow import Config, Drawing, Flow, walk

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
NETWORKS = {
    "coupling": {"name": "coupling", "levels": 2, "steps": 2, "width": 8},
    "transformer": {"name": "transformer", "patch": 2, "dim": 8, "blocks": 2, "layers": 2, "head_dim": 4},
}


def build(network="coupling", size=(8, 8), moved=0.03, **settings):
    torch.manual_seed(0)
    flow = Flow(Config(network=NETWORKS[network], **settings), DataFacts(size, ()))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    return flow


def batch(size=(8, 8), samples=6, first=0):
    image = torch.randint(0, 256, (samples, 3, *size), generator=torch.Generator().manual_seed(first))
    ids = torch.arange(first, first + samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


class Stretch(nn.Module):
    """noise = (x - mean) / std: the density of a normal distribution. Images [B,3,8,8]."""

    dim = 1

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        z = (x.flatten(1) - self.mean) / self.std
        return Coded(z, x.new_full((len(x),), -192 * math.log(self.std)), z[:, :1])

    def inverse(self, noise):
        return (noise * self.std + self.mean).view(-1, 3, 8, 8)


def test_bits_are_those_of_a_normal_distribution():
    """A pixel's density on the scale of values, 128 times wider, is that of its value, dequantised."""
    flow, data = build(), batch()
    flow.network = Stretch(0.1, 0.6)
    u = CTX.random(data, "flow.dequantise").uniform(3, 8, 8)
    law = torch.distributions.Normal(128 * (0.1 + 1), 128 * 0.6)
    expected = -law.log_prob(data["image"].double() + u).flatten(1).mean(dim=1) / math.log(2)
    output = flow(data, CTX)
    torch.testing.assert_close(output.losses.double(), expected, rtol=1e-5, atol=0)
    assert float(output.metrics["bits_per_dim_exact"]) == pytest.approx(float(expected.mean()), rel=1e-5)
    generator = flow.encoders()["generator"]
    assert isinstance(generator, Likely)
    bits = generator.likelihood(data["image"], data["id"], {}, 1, None)  # the same seed, and the purpose and epoch too
    torch.testing.assert_close(bits.total, expected, rtol=1e-5, atol=0)
    assert bits.name == "bits_per_dim_exact" and bits.total.dtype == torch.float64
    with pytest.raises(ConfigError, match="a flow's likelihood is exact and has no steps"):
        generator.check_likelihood(10)


def test_with_noise_the_density_is_of_noised_images_and_samples_are_brought_back():
    flow, data = build(noise=0.5), batch()
    flow.network = Stretch(0.1, 0.6)
    noised = data["image"].double() / 127.5 - 1 + 0.5 * CTX.random(data, "flow.noise").normal(3, 8, 8)
    expected = -torch.distributions.Normal(0.1, 0.6).log_prob(noised).flatten(1).mean(dim=1) / math.log(2) + 7
    output = flow(data, CTX)
    torch.testing.assert_close(output.losses.double(), expected, rtol=1e-5, atol=0)
    assert "noised_bits_per_dim" in output.metrics and "bits_per_dim_exact" not in output.metrics
    assert "bits_per_dim_exact" in flow(data, StepContext(seed=1, clock=Clock(0, 0, 100), training=False)).metrics
    # clean images are N(0.1, 0.36 - 0.25): what is expected of a noised one lies 0.11 / 0.36 of the way from the mean
    ids, generator = torch.arange(4), flow.encoders()["generator"]
    plain = generator.make(ids, {}, 3, Drawing(denoise=False, temperature=0.4)).float() / 127.5 - 1
    found = generator.make(ids, {}, 3, Drawing(temperature=0.4)).float() / 127.5 - 1
    inside = plain.abs() < 0.99
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(found[inside], 0.1 + (plain - 0.1)[inside] * 0.11 / 0.36, rtol=0, atol=0.009)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_made_belongs_to_its_id_and_is_what_its_noise_stands_for(network):
    flow = build(network).eval()
    generator, ids = flow.encoders()["generator"], torch.arange(5)
    together = generator.make(ids, {}, 3, Drawing())
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 8, 8)
    assert torch.equal(generator.make(ids[3:], {}, 3, Drawing()), together[3:])
    assert not torch.equal(generator.make(ids, {}, 4, Drawing()), together)
    cold = generator.make(ids, {}, 3, Drawing(temperature=0.0))
    assert torch.equal(cold[0], cold[1]) and cold.float().std() < together.float().std()
    data = batch()
    bits = generator.likelihood(data["image"], data["id"], {}, 0, None).total
    torch.testing.assert_close(generator.likelihood(data["image"][4:], data["id"][4:], {}, 0, None).total, bits[4:])


def test_a_flow_that_has_diverged_names_the_sample():
    flow = build()
    flow.network = Stretch(math.nan, 1.0)
    with pytest.raises(NonFiniteError, match=r"sample 4 \(one of 2\) is not finite"):
        flow.encoders()["generator"].make(torch.tensor([4, 9]), {}, 0, Drawing())


def test_a_run_is_not_ended_by_a_sample_that_is_shown():
    """What is not finite is grey in the showcase; the other samples are there."""
    flow = build()
    whole = flow.showcase(batch(), CTX)["samples"].image
    inverse = flow.network.inverse
    flow.network.inverse = lambda noise: inverse(noise).index_fill(0, torch.tensor([1]), float("nan"))
    torn = flow.showcase(batch(), CTX)["samples"].image
    changed = (torn != whole).any(axis=-1)
    assert changed.any() and set(changed.nonzero()[1] // 10) == {1}  # of samples of 8 pixels, 2 apart
    assert set(torn[changed].ravel().tolist()) == {128}


def test_between_two_noises_lies_an_arc_as_long_as_they_are():
    torch.manual_seed(1)
    first, last = torch.randn(2, 3000)
    path = walk(first, last, 5)
    torch.testing.assert_close(path[[0, -1]], torch.stack([first, last]), rtol=1e-4, atol=1e-4)
    lengths = path.norm(dim=1)
    assert (lengths / first.norm() - 1).abs().max() < 0.05  # a straight line would be shorter by 0.3
    assert torch.allclose(walk(first, first, 3), first.expand(3, -1), atol=1e-3)


def begun(folder):
    """How actnorm begins, from this rank's share of 12 images."""
    rank, world = dist.get_rank(), dist.get_world_size()
    flow, data = build(moved=0.0).eval(), batch(samples=12)
    mine = {name: value[rank * 12 // world : (rank + 1) * 12 // world] for name, value in data.items()}
    with torch.no_grad():
        flow.surveyed("start", flow.look("start", mine, CTX) | {"id": mine["id"]}, CTX)
    torch.save(flow.state_dict(), folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


def test_one_rank_begins(folder, lone_group):
    begun(folder)


@pytest.mark.world_size(2)
def test_two_ranks_begin(folder):
    with process_group(timeout_minutes=1):
        begun(folder)


def test_actnorm_begins_alike_on_all_ranks_and_every_channel_of_every_layer_is_standard(folder):
    alone, *others = (torch.load(folder / f"{part}.pt") for part in ("1-0", "2-0", "2-1"))
    for name, value in alone.items():
        assert torch.equal(others[0][name], others[1][name])
        torch.testing.assert_close(others[0][name], value, rtol=1e-5, atol=1e-6)
    flow, data, seen = build(moved=0.0).eval(), batch(samples=12), []
    flow.load_state_dict(alone)
    for layer in flow.modules():
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda _, inputs, out: seen.append(out[0].detach()))
    with torch.no_grad():
        from pipeline.core.random import SampleRandom

        random = SampleRandom(CTX.seed, "flow.start", torch.zeros_like(data["id"]), data["id"])
        flow.network(flow.dequantised(data["image"], random))
    assert len(seen) == 12  # three in each step
    for y in seen:
        assert float(y.mean(dim=(0, 2, 3)).abs().max()) < 1e-3
        assert float((y.std(dim=(0, 2, 3), correction=0) - 1).abs().max()) < 1e-2


def test_a_start_is_made_once(lone_group):
    flow, data = build(moved=0.0), batch(samples=12)
    rows = {"image": data["image"], "id": data["id"]}
    flow.surveyed("start", rows, CTX)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.surveyed("start", {**rows, "image": 255 - rows["image"] // 2}, CTX)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert build("transformer").surveys() == {} and list(flow.surveys()) == ["start"]


@pytest.mark.parametrize("network", NETWORKS)
def test_training_learns_what_images_are_like(network, lone_group):
    """Greys of 64 values, one for all pixels but for two bits: who knows nothing needs 8 bits a number."""
    flow = build(network, moved=0.0)
    level = torch.randint(40, 104, (32, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    image = (level + torch.randint(0, 4, (32, 3, 8, 8), generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    data = {"image": image, "id": torch.arange(32), "epoch": torch.zeros(32, dtype=torch.int64)}
    if network == "coupling":
        flow.surveyed("start", {"image": image, "id": data["id"]}, CTX)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        output = flow(data | {"epoch": torch.full((32,), step)}, CTX)
        output.loss.backward()
        optimizer.step()
    assert output.loss.item() < 4.5
