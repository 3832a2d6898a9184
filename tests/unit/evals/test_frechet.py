import pytest
import torch

from pipeline.evals.frechet import Config as FrechetConfig
from pipeline.evals.frechet import Frechet, distance, moments
from tests.unit.evals.generated import encoders, generator, real, run


def test_distance_of_known_gaussians(lone_group):
    """O11: d (delta^2 + (sigma1 - sigma2)^2) = 16 (1/16 + 1/4), exactly and from samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    mean, cov = x.mean(dim=0), torch.cov(x.T)
    values, vectors = torch.linalg.eigh(cov)
    x = (x - mean) @ (vectors * values.rsqrt()) @ vectors.T  # exactly N(0, 1) in its two moments
    one = moments(iter(x.split(999)), 16)
    assert distance(one, moments(iter([0.25 + 1.5 * x]), 16)) == pytest.approx(5.0, abs=1e-6)
    assert distance(one, one) == pytest.approx(0.0, abs=1e-6)
    sampled = 0.25 + 1.5 * torch.randn(20000, 16, generator=generator)
    assert distance(one, moments(iter([sampled]), 16)) == pytest.approx(5.0, abs=0.15)
    # a rotation of one, so that the two covariances do not commute
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    stretched = x * torch.linspace(0.5, 2, 16)
    found = distance(moments(iter([stretched]), 16), moments(iter([stretched @ turn]), 16))
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
    assert wrong["frechet/width"].value == 3 and wrong["frechet/distance"].better == "lower"
