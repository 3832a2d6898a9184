import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError, DataError
from pipeline.evals import frechet
from pipeline.evals._judged import halves
from pipeline.evals.frechet import Config as FrechetConfig
from pipeline.evals.frechet import Frechet, distance, moments
from tests.unit.evals.generated import encoders, generator, real, run


def test_distance_of_known_gaussians():
    """O11: d (delta^2 + (sigma1 - sigma2)^2) = 16 (1/16 + 1/4), exactly and from samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    mean, cov = x.mean(dim=0), torch.cov(x.T)
    values, vectors = torch.linalg.eigh(cov)
    x = (x - mean) @ (vectors * values.rsqrt()) @ vectors.T  # exactly N(0, 1) in its two moments
    one = moments(x)
    assert distance(one, moments(0.25 + 1.5 * x)) == pytest.approx(5.0, abs=1e-6)
    assert distance(one, one) == pytest.approx(0.0, abs=1e-6)
    sampled = 0.25 + 1.5 * torch.randn(20000, 16, generator=generator)
    assert distance(one, moments(sampled)) == pytest.approx(5.0, abs=0.15)
    # a rotation of one, so that the two covariances do not commute
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    stretched = x * torch.linspace(0.5, 2, 16)
    found = distance(moments(stretched), moments(stretched @ turn))
    s = torch.diag(torch.linspace(0.5, 2, 16).double() ** 2)
    product = torch.linalg.eigvals(s @ (turn.T @ s @ turn))
    assert found == pytest.approx(float(2 * s.trace() - 2 * product.real.sqrt().sum()), rel=1e-6)


def test_it_shrinks_with_samples_and_grows_with_a_wrong_generator(lone_group):
    found = {n: run(Frechet(FrechetConfig(samples=n)), encoders(), {"train": real(1000)}) for n in (20, 1000)}
    values = {n: r["frechet/distance"].value for n, r in found.items()}
    assert 0 <= values[1000] < values[20] and values[1000] < 1e-3
    one_class = encoders() | {"generator": generator(classes=0)}
    wrong = run(Frechet(FrechetConfig(samples=200)), one_class, {"train": real(1000)})
    assert wrong["frechet/distance"].value > 100 * values[1000]
    assert found[1000]["frechet/distance_real"].n == 500 and found[20]["frechet/distance_real"].n == 20
    floor = {n: r["frechet/distance_real"].value for n, r in found.items()}
    assert values[20] < 10 * floor[20] and wrong["frechet/distance"].value > 30 * wrong["frechet/distance_real"].value
    assert wrong["frechet/width"].value == 3 and wrong["frechet/distance"].better == "lower"


def test_moments_are_the_same_in_blocks(monkeypatch):
    x = 40 + torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    whole = moments(x)
    monkeypatch.setattr(frechet, "ROWS", 64)
    torch.testing.assert_close(moments(x), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.cov, torch.cov(x.T.double()), rtol=1e-9, atol=1e-9)


def test_real_images_against_real_ones_give_the_scale(lone_group):
    """By hand: the halves are drawn once for all, and none of them is in both."""
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(1))
    one, other = halves(x, 30)
    assert len(one) == 30 and len(other) == 60
    assert torch.equal(torch.cat([one, other]).sort(dim=0).values, x.sort(dim=0).values)
    assert [len(part) for part in halves(x, 1000)] == [45, 45]
    without = run(Frechet(FrechetConfig(samples=20, baseline=False)), encoders(), {"train": real(50)})
    assert "frechet/distance_real" not in without and "frechet/distance" in without


def test_the_space_may_be_the_models_own_encoder(lone_group):
    known = encoders() | {"image": encoders()["judge.image"]}
    other = run(Frechet(FrechetConfig(samples=20)), known, {"train": real(50)})
    del known["judge.image"]
    own = run(Frechet(FrechetConfig(samples=20, space="image")), known, {"train": real(50)})
    assert own["frechet/distance"] == other["frechet/distance"]
    assert Frechet(FrechetConfig(space="logits")).uses().encoders == ("generator", "logits")


class Broken(nn.Module):
    """Features that are not finite where an image is dark."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.inner = encoders()["judge.image"]

    def forward(self, image):
        x = self.inner(image)
        return x.masked_fill(x < -0.6, torch.nan)


def test_features_that_are_not_finite_are_an_error_and_not_a_number(lone_group):
    known = encoders() | {"judge.image": Broken()}
    with pytest.raises(DataError, match=r"'judge.image' gives features of made images that are not finite"):
        run(Frechet(FrechetConfig(samples=20)), known, {"train": real(50)})
    known["generator"] = generator(classes=0)  # grey in the middle
    with pytest.raises(DataError, match=r"'judge.image' gives features of stream 'train' that are not finite"):
        run(Frechet(FrechetConfig(samples=20)), known, {"train": real(50)})


def test_too_few_real_images_are_refused(lone_group):
    with pytest.raises(ConfigError, match="stream 'train' has 3 images, and 4 are needed"):
        run(Frechet(FrechetConfig(samples=20)), encoders(), {"train": real(3)})
