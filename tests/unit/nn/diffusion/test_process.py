"""The learned schedule (the others are looked at where they are used)."""

import math

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.nn.diffusion import likelihood
from pipeline.nn.diffusion.process import Learned


def build(stirred=True):
    torch.manual_seed(0)
    process = Learned()
    if stirred:
        with torch.no_grad():
            process.gamma.steepness.normal_()
            process.gamma.height.normal_()
            process.gamma.centre.normal_(std=3)
    return process


def test_it_rises_from_end_to_end_and_its_slope_is_its_derivative():
    process = build()
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    u.requires_grad_()
    found = process.training_levels(u)
    gamma = -found.level.snr.log()
    assert (gamma.diff() > 0).all()
    assert gamma[0].item() == pytest.approx(-13.3, abs=1e-5) and gamma[-1].item() == pytest.approx(5.0, abs=1e-5)
    assert found.first.item() == pytest.approx(-13.3) and -found.last.snr.log().item() == pytest.approx(5.0)
    torch.testing.assert_close(found.level.time, gamma)
    found.loss.append(torch.full_like(u, 0.5))  # a factor of one
    (slope,) = torch.autograd.grad(gamma.sum(), u)
    torch.testing.assert_close(found.slope, slope, rtol=1e-6, atol=1e-9)
    assert slope.std().item() > 1  # not a straight line


def test_the_bound_depends_on_the_ends_alone():
    """O6 in continuous time: Gaussian data, the best denoiser, any schedule between the ends."""
    s, low, high = 0.5, -5.0, 13.3
    expected = 0.5 * math.log((1 + s**2 * math.exp(high)) / (1 + s**2 * math.exp(low)))
    for process in (build(), build(stirred=False)):
        n = 20_000
        found = process.training_levels((torch.arange(n).double() + 0.5) / n)
        snr = found.level.snr
        error = snr * s**2 / (1 + s**2 * snr)  # of the noise
        image = torch.zeros(1, 1, dtype=torch.float64)
        bits = likelihood.continuous(image, image, error, found.slope, found.first, found.last)
        rest = likelihood.continuous(image, image, torch.zeros(1).double(), found.slope[:1], found.first, found.last)
        assert (bits - rest).mean().item() * math.log(2) == pytest.approx(expected, rel=1e-5)


def test_the_ends_follow_the_loss_and_the_inside_its_square():
    process = build()
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)

    def loss_of(found):
        return (found.level.s * 3 + found.slope).square()

    found = process.training_levels(u)
    loss = loss_of(found)
    found.loss.append(loss.detach())
    loss.sum().backward()
    grown = {name: p.grad.clone() for name, p in process.named_parameters()}
    process.zero_grad()
    for power, names in ((1, {"gamma.ends"}), (2, set(grown) - {"gamma.ends"})):
        found = process.training_levels(u)
        found.loss.append(torch.full_like(u, 0.5))
        process.zero_grad()
        (loss_of(found) ** power).sum().backward()
        for name, p in process.named_parameters():
            if name in names:
                torch.testing.assert_close(grown[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_chains():
    process = build()
    for spacing in ("leading", "trailing", "linspace", "karras"):
        levels = process.chain(10, spacing)
        assert len(levels) == 10 and (levels.s.diff() > 0).all() and not levels.a.requires_grad
    ends = process.likelihood_chain(30)
    assert float(ends.time[0]) == pytest.approx(-13.3, abs=0.7) and float(ends.time[-1]) == pytest.approx(5.0)
    assert float(process.chain(10, "karras").time[0]) == pytest.approx(-13.3, abs=1e-5)
    with pytest.raises(ConfigError, match="set steps"):
        process.likelihood_chain(None)
