"""The bounds against the closed form of a linear Gaussian model; free bits, beta, and what is made."""

import math

import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, Embeddings, StepContext
from pipeline.nn.generative.gaussian import Posterior, importance_weighted
from pipeline.objectives.vae import VAE, Config, Drawing

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
NETWORK = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent": 4}


def build(size=(8, 8), **settings):
    torch.manual_seed(0)
    return VAE(Config(**{"network": NETWORK} | settings), DataFacts(size, ()))


def batch(size=(8, 8), samples=6, first=0):
    image = torch.randint(0, 256, (samples, 3, *size), generator=torch.Generator().manual_seed(first))
    ids = torch.arange(first, first + samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


class Linear(nn.Module):
    """x = W z + b + noise; its posterior is known. Codes [B,2,1,1], images [B,3,2,2]."""

    def __init__(self, std):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w, self.b = torch.randn(12, 2, generator=generator).double() * 0.3, torch.full((12,), 0.1).double()
        precision = torch.eye(2).double() + self.w.T @ self.w / std**2
        self.cov = precision.inverse()
        self.gain, self.std = self.cov @ self.w.T / std**2, std

    def decode(self, z):
        return (z.flatten(1).double() @ self.w.T + self.b).view(-1, 3, 2, 2)

    def log_marginal(self, x):
        law = torch.distributions.MultivariateNormal(self.b, self.w @ self.w.T + self.std**2 * torch.eye(12).double())
        return law.log_prob(x.flatten(1).double())


@pytest.fixture
def linear(monkeypatch):
    """A model whose decoder is linear; its encoder says the exact posterior, if the code's numbers were independent."""
    model = build((2, 2), decoder="normal", network=NETWORK | {"multipliers": (1, 2), "latent": 2})
    known = Linear(0.2)
    model.pixels.log_scale.data.fill_(math.log(0.2))
    monkeypatch.setattr(model.model, "decode", known.decode)
    return model, known


def dequantised(data):
    uniform = CTX.random(data, "vae.dequantise").uniform(3, 2, 2)
    return (data["image"].double() + uniform) / 128 - 1


def test_the_bound_is_the_closed_form_of_a_linear_model(linear, monkeypatch):
    """E_q log p(x | z) - KL, with q known: mean, variance, trace; the average of draws tends to it."""
    model, known = linear
    data = batch((2, 2), 1)
    x = dequantised(data).flatten(1) - known.b
    mean, std = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 0.2]).double()
    monkeypatch.setattr(model, "posterior", lambda _: Posterior(mean.view(1, 2, 1, 1), std.log().view(1, 2, 1, 1)))
    left = (x - mean @ known.w.T).square().sum() + (known.w.square() @ std.square()).sum()
    reconstruction = -left / (2 * 0.04) - 12 * math.log(0.2 * math.sqrt(2 * math.pi))
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum()
    expected = -(reconstruction - kl) / (12 * math.log(2)) + 7
    u = CTX.random(data, "vae.dequantise").uniform(3, 2, 2)
    draws = 4000
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in data.items()}
    many["id"] = torch.arange(draws)
    monkeypatch.setattr(
        StepContext, "random", lambda ctx, b, what: Fixed(u) if what == "vae.dequantise" else RANDOM(ctx, b, what)
    )
    metrics = model(many, CTX).metrics
    assert float(metrics["bits_per_dim_bound"]) == pytest.approx(float(expected), abs=0.03)
    assert float(metrics["rate"]) == pytest.approx(float(kl) / (12 * math.log(2)), rel=1e-5)


RANDOM = StepContext.random


class Fixed:
    def __init__(self, u):
        self.u = u

    def uniform(self, *shape):
        return self.u


def test_many_draws_tend_to_the_marginal_likelihood(linear, monkeypatch):
    """From the bound, by K draws, to log p(x); with the exact posterior one draw is enough."""
    model, known = linear
    image = batch((2, 2), 40)["image"]
    x = (image.double() + 0.5) / 128 - 1
    centre = (x.flatten(1) - known.b) @ known.gain.T
    marginal = -known.log_marginal(x) / (12 * math.log(2)) + 7
    spread = (2 * known.cov.diagonal().sqrt()).log().view(1, 2, 1, 1)  # twice as wide as it should be
    monkeypatch.setattr(
        model, "posterior", lambda _: Posterior(centre.view(-1, 2, 1, 1), spread.expand(len(image), 2, 1, 1))
    )
    monkeypatch.setattr("pipeline.objectives.vae.SampleRandom", Halves)
    ids = torch.arange(len(image))
    generator = model.encoders()["generator"]

    def gap(k):
        found = generator.likelihood(image, ids, {}, 0, k).total.detach()
        return float((found - marginal).mean())

    bound = generator.likelihood(image, ids, {}, 0, None)
    assert bound.name == "bits_per_dim_bound" and list(bound.parts) == ["distortion", "rate"]
    one, ten, many = gap(1), gap(10), gap(1500)
    assert one > 0.1 and 0.5 * one > ten > 5 * abs(many) and abs(many) < 2e-3
    assert float((bound.total - marginal).detach().mean()) == pytest.approx(one, abs=0.05)
    # with what the posterior really is, correlations included, every single draw has the whole answer
    z = torch.linalg.cholesky(known.cov) @ torch.randn(2, 1, dtype=torch.float64) + centre[:1].T
    law = torch.distributions.MultivariateNormal(centre[0], known.cov)
    joint = torch.distributions.Normal(0, 1).log_prob(z).sum() - law.log_prob(z[:, 0])
    decoded = model.model.decode(z.view(1, 2, 1, 1))
    told = model.pixels.log_likelihood(image[:1], decoded, Halves(0, "", ids[:1], ids[:1])).double()
    assert float(importance_weighted((told.detach() + joint)[None])) == pytest.approx(
        float(known.log_marginal(x[:1])), rel=1e-6
    )


class Halves:
    """Random numbers whose uniform ones are all one half."""

    def __init__(self, seed, purpose, epoch, ids):
        self.n, self.generator = len(ids), torch.Generator().manual_seed(len(purpose))

    def uniform(self, *shape):
        return torch.full((self.n, *shape), 0.5)

    def normal(self, *shape):
        return torch.randn(self.n, *shape, generator=self.generator)


def test_a_channel_below_its_free_bits_costs_the_limit_and_moves_nothing():
    model = build(free_bits=3.0, beta=0.5)
    kl = torch.tensor([[1.0, 7.0, 2.0, 4.1], [3.0, 1.0, 2.0, 2.1]], requires_grad=True)  # means 2, 4, 2, 3.1
    distortion, code = torch.tensor([5.0, 6.0]), torch.zeros(2, 4)
    output = model.loss(Embeddings({"distortion": distortion, "kl": kl, "code": code}, {}), CTX)
    to_bits = 1 / (192 * math.log(2))
    assert output.loss.item() == pytest.approx(5.5 + 0.5 * to_bits * (3 + 4 + 3 + 3.1), rel=1e-6)
    output.loss.backward()
    assert (kl.grad == 0).tolist() == [[True, False, True, False]] * 2
    assert kl.grad[0, 1] == pytest.approx(0.25 * to_bits)
    assert float(output.metrics["bits_per_dim_bound"]) == pytest.approx(5.5 + to_bits * 11.1, rel=1e-6)


def test_channels_in_use_are_counted():
    model = build()  # codes of 4 x 4 places
    kl = torch.tensor([[0.0, 0.15, 0.17, 3.0]])
    rows = {"distortion": torch.tensor([5.0]), "kl": kl, "code": torch.zeros(1, 4)}
    assert float(model.loss(Embeddings(rows, {}), CTX).metrics["active"]) == 0.5


@pytest.mark.parametrize("decoder", ["normal", "logistic"])
def test_what_is_made_belongs_to_its_id(decoder):
    generator = build(decoder=decoder).eval().encoders()["generator"]
    ids = torch.arange(5)
    together = generator.make(ids, {}, 3, Drawing())
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 8, 8)
    assert torch.equal(generator.make(ids[3:], {}, 3, Drawing()), together[3:])
    assert not torch.equal(generator.make(ids, {}, 4, Drawing()), together)
    cold = generator.make(ids, {}, 3, Drawing(temperature=0.0))
    assert torch.equal(cold[0], cold[1])
    data = batch()
    bits = generator.likelihood(data["image"], data["id"], {}, 0, 3)
    part = generator.likelihood(data["image"][4:], data["id"][4:], {}, 0, 3)
    torch.testing.assert_close(bits.total[4:], part.total)
    assert bits.name == "bits_per_dim_importance_weighted_3"


def test_training_puts_the_level_of_an_image_into_its_code():
    """Levels are uniform over 176 values: who does not know an image's needs 7.46 bits."""
    model = build(decoder="logistic")
    level = torch.randint(40, 216, (32, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    image = (level + torch.randint(-2, 3, (32, 3, 8, 8), generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    data = {"image": image, "id": torch.arange(32), "epoch": torch.zeros(32, dtype=torch.int64)}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        output = model(data | {"epoch": torch.full((32,), step)}, CTX)
        output.loss.backward()
        optimizer.step()
    assert output.loss.item() < 7.2 and output.metrics["rate"].item() > 0.05


def test_images_that_cannot_be_halved_are_refused():
    with pytest.raises(ConfigError, match="multiples of 2 pixels; they are 9x8"):
        build((9, 8))
