"""Distances of domains against skada's, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.nn.adaptation.mmd import BANDWIDTHS, mmd
from pipeline.nn.adaptation.moments import coral, moments

losses = pytest.importorskip("skada.deep.losses", reason="make parity installs it")


@pytest.fixture
def domains() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 24, 6, generator=generator, dtype=torch.float64)
    return source.requires_grad_(), (target * 1.5 + 0.3).requires_grad_()


def same(ours: Tensor, theirs: Tensor, domains: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, domains), torch.autograd.grad(theirs, domains))


def test_deep_coral(domains):
    source, target = domains
    same(coral(moments(source), moments(target)), losses.deepcoral_loss(source, target), domains)


def test_mmd_with_the_same_kernels(domains):
    """skada's own kernels are of the distance, not of its square; its discrepancy takes any."""
    source, target = domains
    both = torch.cat([source, target]).detach()
    sigma = torch.cdist(both, both).square().mean()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = (x[:, None] - y[None]).square().sum(2)
        return sum((torch.exp(-squares / (2 * b * sigma)) for b in BANDWIDTHS), torch.zeros(()))

    theirs = losses._maximum_mean_discrepancy(source, target, kernel=kernel)
    same(mmd(source, target, estimator="biased"), theirs, domains)
