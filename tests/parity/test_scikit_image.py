"""Lab, and the bins of colours, against scikit-image."""

import numpy as np
import pytest
import torch

from pipeline.nn.lab import colour_bins, to_lab, to_rgb

color = pytest.importorskip("skimage.color", reason="needs the extra 'parity'")


def test_lab_and_back_are_scikit_images():
    rgb = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    expected = color.rgb2lab(rgb)
    found = to_lab(torch.from_numpy(rgb).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    back = to_rgb(torch.from_numpy(expected).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert np.array_equal(back.numpy(), rgb)


def test_bins_are_those_that_scikit_image_finds_a_colour_for():
    levels = np.arange(0, 256, 3)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 1, 3).astype(np.uint8)
    nearest = np.unique(np.rint(color.rgb2lab(cube)[:, 0, 1:] / 10).astype(int), axis=0)
    assert {tuple(row) for row in nearest.tolist()} == {tuple(row) for row in (colour_bins() / 10).int().tolist()}
