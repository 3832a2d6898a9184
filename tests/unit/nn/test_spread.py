"""How much of their space features fill: closed forms."""

import math

import pytest
import torch

from pipeline.nn.spread import LEAST_RANK, LEAST_STD, Spread, spread_of


def test_points_all_around_fill_the_sphere():
    """Each axis in both directions: every dimension of unit vectors has variance 1/D, and all D directions count."""
    around = torch.cat([torch.eye(6), -torch.eye(6)]) * 3
    std, rank = spread_of(around)
    assert std == pytest.approx(1, rel=1e-6) and rank == pytest.approx(6, rel=1e-4)
    assert not spread_of(around).collapsed


@pytest.mark.parametrize("kind", ["one point", "nearly one point", "one line", "nothing"])
def test_a_collapse_is_told(kind):
    base, noise = torch.arange(1.0, 9).expand(64, 8), torch.randn(64, 8, generator=torch.manual_seed(0))
    features = {
        "one point": base,
        "nearly one point": base + 0.01 * noise,
        "one line": base * noise[:, :1],
        "nothing": torch.zeros(64, 8),
    }
    assert spread_of(features[kind]).collapsed
    assert not spread_of(base + noise).collapsed


def test_either_alone_is_a_collapse():
    assert Spread(LEAST_STD / 2, 9).collapsed and Spread(1, LEAST_RANK - 0.1).collapsed
    assert not Spread(LEAST_STD, LEAST_RANK).collapsed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_have_none_and_are_no_error(value):
    features = torch.eye(8)
    features[3, 2] = value
    found = spread_of(features)
    assert all(map(math.isnan, found)) and not found.collapsed
