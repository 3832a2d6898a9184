import numpy as np
import pytest
import scipy.stats
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.mixing import Mixing, beta, mix


def numbers(ids):
    return SampleRandom(0, "supervised.mix", torch.zeros_like(ids), ids)


IDS = torch.arange(2000)
PICTURES = torch.arange(2000.0)[:, None, None, None].expand(-1, 1, 8, 8)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_beta_has_the_distribution_of_scipy(alpha):
    found = beta(numbers(IDS), alpha).double().numpy()
    assert scipy.stats.kstest(found, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("alpha", [0.3, 0.99, 1.0, 1.5, 2.0])
def test_no_part_is_likelier_than_the_density_has_it(alpha):
    """That all tries are rejected, which gives a half, is as good as never: of 40,000 none."""
    found = beta(numbers(torch.arange(40_000)), alpha)
    assert int((found == 0.5).sum()) == 0
    assert found.double().var() == pytest.approx(scipy.stats.beta(alpha, alpha).var(), rel=0.03)


def test_what_is_erased_is_mixed_like_the_rest():
    """As timm and MAE have it: half of the noise in a blended image is the neighbour's."""
    ones, ids = torch.ones(2000, 1, 16, 16), torch.arange(2000)
    x, _, part = mix(ones, numbers(ids), Mixing(mixup=1.0, erase=1.0))
    noise = (x - 1).flatten(1)
    touched = (noise != 0).any(1)
    assert touched.float().mean() > 0.95
    alone = (noise != 0).float().mean(1)
    assert alone.mean() > 0.25  # the union of two rectangles; one covers 0.17 on average
    assert part.std() > 0.2


def test_mixup_blends_neighbours_by_the_part_that_labels_are_given():
    x, partner, part = mix(PICTURES, numbers(IDS), Mixing(mixup=0.8))
    assert torch.equal(partner, IDS.view(-1, 2).flip(1).flatten())
    expected = part * IDS + (1 - part) * partner
    torch.testing.assert_close(x, expected[:, None, None, None].expand_as(x), rtol=1e-4, atol=1e-2)


def test_cutmix_takes_a_rectangle_and_labels_follow_its_true_area():
    x, partner, part = mix(PICTURES, numbers(IDS), Mixing(cutmix=1.0))
    own = x[:, 0] == IDS[:, None, None]
    assert torch.equal(own | (x[:, 0] == partner[:, None, None]), torch.ones_like(own))
    torch.testing.assert_close(own.float().mean((1, 2)), part)
    for mask in ~own[:100]:
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0))
    assert 0.55 < part.mean() < 0.75  # more than half: rectangles are cut off at the border


def test_each_kind_is_for_half_the_samples():
    x, partner, _ = mix(PICTURES, numbers(IDS), Mixing(mixup=0.8, cutmix=1.0))
    cut = ((x == PICTURES) | (x == PICTURES[partner])).flatten(1).all(1)
    assert 0.45 < cut.float().mean() < 0.6


def test_erasing_replaces_a_rectangle_by_noise_in_so_many_samples():
    ones = torch.ones(2000, 3, 20, 20)
    x, partner, part = mix(ones, numbers(IDS), Mixing(erase=0.25))
    gone = (x != 1).all(1)
    hit = gone.flatten(1).any(1)
    assert torch.equal(partner, IDS) and (part == 1).all() and 0.22 < hit.float().mean() < 0.28
    area = gone[hit].float().mean((1, 2))
    assert 0.01 < area.min() < 0.06 and 0.25 < area.max() < 0.37
    noise = x[(x != 1)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_what_becomes_of_a_sample_does_not_depend_on_the_micro_batch():
    settings = Mixing(mixup=0.8, cutmix=1.0, erase=0.5)
    x = torch.randn(2000, 1, 8, 8)
    whole = mix(x, numbers(IDS), settings)
    piece = mix(x[10:16], numbers(IDS[10:16]), settings)
    assert torch.equal(piece.x, whole.x[10:16]) and torch.equal(piece.part, whole.part[10:16])
    assert not np.array_equal(whole.x, x)


def test_an_odd_batch_is_refused():
    with pytest.raises(ConfigError, match="take an even number"):
        mix(PICTURES[:3], numbers(IDS[:3]), Mixing(mixup=0.2))


def test_nothing_is_active_by_default():
    assert not Mixing().active and Mixing(cutmix=1.0).active
