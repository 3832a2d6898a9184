"""Scores against known densities, Langevin's moments by recursion, the loss as DDPM's, samples by their ids."""

import math

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import NonFiniteError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.diffusion.levels import add_noise, from_sigma
from pipeline.nn.diffusion.targets import SIGMA_DATA, to_image
from pipeline.nn.generative.energy import LangevinConfig, geometric, langevin, score_of
from pipeline.objectives.energy import Config, EnergyModel

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
NETWORK = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
MEANS, STD = torch.tensor([[-1.0, 0.5], [0.8, -0.4], [0.2, 1.2]], dtype=torch.float64), 0.3
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def build(size=(8, 8), **settings):
    torch.manual_seed(0)
    return EnergyModel(Config(**{"network": NETWORK} | settings), DataFacts(size, ()))


def batch(samples=8):
    image = torch.randint(0, 256, (samples, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


def mixture_energy(x, sigma):
    """-log density of three normal distributions with noise of ``sigma``, up to a constant."""
    variance = (STD**2 + sigma**2)[:, None]
    apart = (x[:, None] - MEANS).square().sum(dim=2)
    return -(SHARES.log() - apart / (2 * variance) - variance.log()).logsumexp(dim=1)


def mixture_score(x, sigma):
    """In closed form: towards each mean, by how likely it is."""
    variance = (STD**2 + sigma**2)[:, None]
    apart = MEANS - x[:, None]
    likely = torch.softmax(SHARES.log() - apart.square().sum(dim=2) / (2 * variance), dim=1)
    return (likely[:, :, None] * apart).sum(dim=1) / variance


def points(samples=500):
    generator = torch.Generator().manual_seed(1)
    sigma = 0.05 + 2 * torch.rand(samples, generator=generator, dtype=torch.float64)
    return 2 * torch.randn(samples, 2, generator=generator, dtype=torch.float64), sigma


def test_the_gradient_of_an_energy_is_the_score_of_a_known_density():
    x, sigma = points()
    torch.testing.assert_close(score_of(mixture_energy, x, sigma), mixture_score(x, sigma))


def test_sigma_times_the_gradient_is_what_a_denoiser_says_the_noise_was():
    """DDPM's x = a image + s noise at the level of the same sigma: its expected image is the mixture's own."""
    x, sigma = points()
    level = from_sigma(sigma)
    noise = sigma[:, None] * -score_of(mixture_energy, x, sigma)
    found = to_image("noise", noise, level.a[:, None] * x, level)
    variance = (STD**2 + sigma**2)[:, None]
    likely = torch.softmax(SHARES.log() - (MEANS - x[:, None]).square().sum(dim=2) / (2 * variance), dim=1)
    each = MEANS + STD**2 / variance[:, :, None] * (x[:, None] - MEANS)
    torch.testing.assert_close(found, (likely[:, :, None] * each).sum(dim=1))
    clean, drawn = torch.zeros_like(x), torch.ones_like(x)
    torch.testing.assert_close(add_noise(clean, drawn, level) / level.a[:, None], sigma[:, None] * drawn)


def test_an_untrained_energy_is_that_of_a_normal_distribution():
    model = build().double()
    x, sigma = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0.02, 0.1, 0.5, 1, 2], dtype=torch.float64)
    expected = -x / (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1)
    torch.testing.assert_close(model.energy.score(x, sigma), expected)


def test_what_the_network_adds_is_scaled_by_the_level():
    """A network that answers with one number everywhere: the score in closed form."""
    model = build().double()
    with torch.no_grad():
        model.energy.network.conv_out.bias.fill_(0.3)
    x, sigma = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0.02, 0.1, 0.5, 1, 2], dtype=torch.float64)
    level = sigma.view(-1, 1, 1, 1)
    c = (level**2 + SIGMA_DATA**2).rsqrt()
    torch.testing.assert_close(model.energy.score(x, sigma), -(c**2 * x + SIGMA_DATA / level * c * 0.3))


def test_the_score_is_the_energys_slope():
    """By differences, with a network that says something; and its own gradient by differences, too."""
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, sigma = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
    way, small = torch.randn_like(x), 1e-5
    slope = (model.energy(x + small * way, sigma) - model.energy(x - small * way, sigma)) / (2 * small)
    score = model.energy.score(x, sigma)
    torch.testing.assert_close(-(score * way).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-6)
    weight = model.energy.network.conv_in.weight
    (found,) = torch.autograd.grad(score.square().sum(), weight)
    change = torch.randn_like(weight)

    def size(step):
        with torch.no_grad():
            weight.add_(step * change)
        value = model.energy.score(x, sigma).detach().square().sum()
        with torch.no_grad():
            weight.sub_(step * change)
        return value

    torch.testing.assert_close((found * change).sum(), (size(small) - size(-small)) / (2 * small), rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_squared_error_of_the_noise():
    model = build(levels=3)
    data = batch(16)
    output = model(data, CTX)
    noise = CTX.random(data, "energy.noise").normal(3, 8, 8)
    place = CTX.random(data, "energy.level").uniform(1)[:, 0]
    sigma = torch.tensor([2.0, 0.2, 0.02])[(3 * place).long()].view(-1, 1, 1, 1)
    x = data["image"] / 127.5 - 1 + sigma * noise
    said = sigma * x / (sigma**2 + SIGMA_DATA**2)
    torch.testing.assert_close(output.losses, (said - noise).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert float(output.metrics["loss_q0"]) != float(output.metrics["loss_q3"])
    assert len(sigma.unique()) == 3


def test_langevin_dynamics_have_the_moments_of_their_recursion():
    mean, variance, sigmas = 0.7, 0.25, geometric(0.1, 0.8, 3)
    config = LangevinConfig(steps=4, step=0.3, denoise=True)
    generator = torch.Generator().manual_seed(0)
    n = 200_000

    def noise():
        return torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def score(x, sigma):
        return (mean - x) / (variance + sigma[:, None] ** 2)

    x = langevin(0.8 * noise(), sigmas, score, noise, config)
    m, v = 0.0, 0.64
    for sigma in sigmas.tolist():
        for _ in range(4):
            keep = 1 - 0.3 * sigma**2 / 2 / (variance + sigma**2)
            m, v = keep * m + (1 - keep) * mean, keep**2 * v + 0.3 * sigma**2
    keep = 1 - 0.1**2 / (variance + 0.1**2)
    m, v = keep * m + (1 - keep) * mean, keep**2 * v
    assert float(x.mean()) == pytest.approx(m, abs=4 * math.sqrt(v / n))
    assert float(x.var()) == pytest.approx(v, rel=4 * math.sqrt(2 / n))


def test_langevin_dynamics_find_a_mixtures_parts():
    """Over many small steps: shares, means and spread of the known density with the last level's noise taken out."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(4000, 2, generator=generator, dtype=torch.float64)

    config = LangevinConfig(steps=25, step=0.2, denoise=True)
    x = langevin(3 * noise(), geometric(0.15, 3.0, 10), mixture_score, noise, config)
    nearest = torch.cdist(x, MEANS).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=3) / 4000
    torch.testing.assert_close(shares.double(), SHARES, rtol=0, atol=0.05)
    for part in range(3):
        mine = x[nearest == part]
        torch.testing.assert_close(mine.mean(0), MEANS[part], rtol=0, atol=0.06)
        assert ((mine.std(0) > 0.2) & (mine.std(0) < 0.4)).all()


def test_levels_fall_by_the_same_part():
    sigmas = geometric(0.02, 2.0, 10)
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full((9,), 0.01 ** (1 / 9), dtype=torch.float64))
    assert float(sigmas[0]) == pytest.approx(2.0)


def test_training_finds_the_score():
    """Images of one colour each, of two: the trained score points to them as the closed form does."""
    model = build((4, 4), levels=4, sigma_min=0.2, network=NETWORK | {"attention": [], "multipliers": [1]})
    colours = torch.tensor([[205, 60, 128], [50, 190, 90]])
    image = colours[torch.arange(16) % 2][:, :, None, None].expand(16, 3, 4, 4).to(torch.uint8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        data = {"image": image, "id": torch.arange(16), "epoch": torch.full((16,), step)}
        optimizer.zero_grad()
        model(data, CTX).loss.backward()
        optimizer.step()
    clean = colours.double().view(2, 3, 1, 1).expand(2, 3, 4, 4) / 127.5 - 1
    x = clean[:1].float() + 0.93 * torch.randn(8, 3, 4, 4)
    sigma = torch.full((8,), float(model.sigmas[1]), dtype=torch.float64)
    apart = (clean[None] - x[:, None].double()).flatten(2)
    likely = torch.softmax(-apart.square().sum(2) / (2 * sigma[:, None] ** 2), dim=1)
    expected = (likely[:, :, None] * apart).sum(1) / sigma[:, None] ** 2
    model.eval()
    found = model.energy.score(x, sigma).flatten(1).double().detach()
    assert float((found - expected).norm() / expected.norm()) < 0.35


def test_samples_belong_to_their_ids():
    model = build(levels=3).eval()
    maker, ids = model.encoders()["generator"], torch.arange(4)
    settings = maker.settings({"steps": 2})
    whole = maker.make(ids, {}, 3, settings)
    assert whole.dtype == torch.uint8 and whole.shape == (4, 3, 8, 8)
    assert (maker.make(ids[2:], {}, 3, settings).int() - whole[2:].int()).abs().max() <= 1
    assert not torch.equal(maker.make(ids, {}, 4, settings), whole)
    with torch.no_grad():
        model.energy.network.conv_out.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"sample 0 \(one of 4\) is not finite"):
        maker.make(ids, {}, 3, settings)


def test_levels_that_do_not_rise_are_named():
    with pytest.raises(ValidationError, match=r"sigma_max = 0\.01 must be larger than sigma_min = 0\.02"):
        Config(sigma_max=0.01)
