"""Lab, bins of colours, and what is made of their distributions."""

import numpy as np
import pytest
import torch

from pipeline.nn.lab import BINS_OF_B, annealed_mean, colour_bins, rarity_weights, soft_bins, to_lab, to_rgb


def plain_lab(rgb: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1 and CIE 15, D65, colour by colour in float64: [n,3] from 0 to 1. (scikit-image: tests/parity.)"""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    ratio = linear @ matrix.T / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def cube(step: int) -> torch.Tensor:
    """Colours of the whole cube, uint8[n,3]."""
    levels = torch.arange(0, 256, step, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels)


def test_lab_of_colours_all_over_the_cube_and_back():
    rgb = cube(15)
    found = to_lab(rgb.T.reshape(1, 3, -1, 1))[0, :, :, 0].T
    np.testing.assert_allclose(found.numpy(), plain_lab(rgb.double().numpy() / 255), atol=2e-3)
    from_floats = to_lab(rgb.T.reshape(1, 3, -1, 1).float() / 255)[0, :, :, 0].T
    torch.testing.assert_close(from_floats, found, rtol=1e-4, atol=1e-3)
    back = to_rgb(found.T.reshape(1, 3, -1, 1))[0, :, :, 0].T
    assert (back.int() - rgb.int()).abs().max() <= 1


def test_colours_outside_of_srgb_are_cut_off():
    assert to_rgb(torch.tensor([50.0, 110.0, -110.0]).view(1, 3, 1, 1)).flatten().tolist()[1] == 0


def test_bins_are_those_that_some_colour_is_nearest_to():
    """Over a cube of 86^3 colours each bin is hit, and no colour's nearest point of the grid is missing."""
    ab = plain_lab(cube(3).double().numpy() / 255)[:, 1:]
    hit = {(int(a), int(b)) for a, b in np.unique(np.rint(ab / 10).astype(int), axis=0)}
    bins = colour_bins()
    assert {(int(a), int(b)) for a, b in (bins / 10).tolist()} == hit and len(bins) == len(hit) == 261
    assert sorted(BINS_OF_B) == list(BINS_OF_B)


def test_colours_are_shared_out_over_their_five_nearest_bins():
    bins = colour_bins()
    ab = 160 * torch.rand(300, 2, generator=torch.manual_seed(0)) - 80
    index, share = soft_bins(ab, bins)
    for own, near, weight in zip(ab.double().numpy(), index.numpy(), share.numpy(), strict=True):
        distance = ((own - bins.double().numpy()) ** 2).sum(axis=1)
        order = np.argsort(distance, kind="stable")[:5]
        np.testing.assert_allclose(distance[near], distance[order], atol=1e-2)
        expected = np.exp(-distance[near] / (2 * 25))
        np.testing.assert_allclose(weight, expected / expected.sum(), atol=1e-4)


@pytest.mark.parametrize("part", [0.5, 1.0, 0.1])
def test_rare_colours_count_more_and_the_mean_weight_is_one(part):
    share = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    found = rarity_weights(share, part)
    raw = [1 / ((1 - part) * p + part / 4) for p in share.tolist()]
    mean = sum(p * w for p, w in zip(share.tolist(), raw, strict=True))
    assert found.tolist() == pytest.approx([w / mean for w in raw])
    assert float((share * found).sum()) == pytest.approx(1)
    assert torch.allclose(found, found[:1]) if part == 1 else found[3] > found[2] > found[0]


def test_the_annealed_mean_runs_from_the_mean_to_the_most_likely_bin():
    bins = colour_bins()
    logits = torch.randn(2, len(bins), 3, 1, generator=torch.manual_seed(0))
    mean = torch.einsum("bqhw,qc->bchw", logits.softmax(dim=1), bins)
    torch.testing.assert_close(annealed_mean(logits, bins, 1.0), mean)
    torch.testing.assert_close(annealed_mean(logits, bins, 1e-4), bins[logits.argmax(dim=1)].permute(0, 3, 1, 2))
    p = logits[0, :, 0, 0].double().softmax(dim=0)
    sharp = (p.log() / 0.38).exp() / (p.log() / 0.38).exp().sum()
    torch.testing.assert_close(
        annealed_mean(logits, bins, 0.38)[0, :, 0, 0].double(), sharp @ bins.double(), rtol=1e-4, atol=1e-4
    )
