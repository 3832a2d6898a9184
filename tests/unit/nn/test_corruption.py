import pytest
import torch
from pydantic import ValidationError

from pipeline.core.random import SampleRandom
from pipeline.nn.corruption import Corruption, corrupt, rectangle


def numbers(ids):
    return SampleRandom(0, "mae.corruption", torch.zeros_like(ids), ids)


IDS = torch.arange(400)


def test_nothing_is_done_unless_asked():
    assert not Corruption().active and Corruption(holes=1).active and Corruption(noise=0.1).active


def test_each_sample_is_damaged_by_numbers_of_its_own():
    settings = Corruption(noise=0.3, pixels=0.2, channels=0.3, holes=2)
    x = torch.randn(400, 3, 8, 6)
    whole = corrupt(x, numbers(IDS), settings)
    assert torch.equal(corrupt(x[13:20], numbers(IDS[13:20]), settings), whole[13:20])
    assert whole.shape == x.shape and whole.dtype == x.dtype


def test_noise_has_the_deviation_that_is_asked_for():
    added = corrupt(torch.zeros(400, 3, 8, 6), numbers(IDS), Corruption(noise=0.3))
    assert added.mean().abs() < 0.005 and abs(added.std() - 0.3) < 0.005


def test_a_dropped_pixel_is_dropped_in_all_channels():
    kept = corrupt(torch.ones(400, 3, 8, 6), numbers(IDS), Corruption(pixels=0.25)) == 1
    assert torch.equal(kept[:, 0], kept[:, 1]) and abs(kept.float().mean() - 0.75) < 0.02


def test_one_channel_always_stays():
    kept = corrupt(torch.ones(400, 3, 2, 2), numbers(IDS), Corruption(channels=1.0)).amax((2, 3))
    assert (kept.sum(1) == 1).all() and (kept.mean(0) > 0.25).all()
    half = corrupt(torch.ones(400, 3, 2, 2), numbers(IDS), Corruption(channels=0.5)).amax((2, 3))
    assert abs(half.mean() - (1 + 2 * 0.5) / 3) < 0.04


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_holes_are_rectangles_of_the_area_that_is_asked_for(size):
    found = rectangle(numbers(IDS), size, (0.1, 0.2), 2.0)
    assert found.shape == (400, 1, *size)
    for mask in found[:50, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum() and torch.equal(mask, rows[:, None] & columns)
    part = found.float().mean((1, 2, 3))
    assert 0.08 < part.min() < 0.115 and 0.185 < part.max() < 0.22
    rate = found.float().mean(0)
    assert rate[0, size[0] // 2, size[1] // 2] > 0.2 and rate[0, 0, 0] < 0.1


def test_an_area_that_runs_backwards_is_refused():
    with pytest.raises(ValidationError, match="turn it round"):
        Corruption(hole_area=(0.5, 0.1))
