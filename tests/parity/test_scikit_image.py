"""Lab, and the bins of colours, against scikit-image."""

import numpy as np
import pytest
import torch

from pipeline.nn.image_quality import psnr, ssim
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


def test_ssim_and_psnr_are_scikit_images():
    metrics = pytest.importorskip("skimage.metrics", reason="needs the extra 'parity'")
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    other = np.clip(image + rng.normal(0, 30, image.shape), 0, 255).astype(np.uint8)
    ours = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (image, other)]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    expected = [metrics.structural_similarity(a, b, **settings) for a, b in zip(image, other, strict=True)]
    np.testing.assert_allclose(ssim(*ours).numpy(), expected, rtol=1e-9)
    expected = [metrics.peak_signal_noise_ratio(a, b) for a, b in zip(image, other, strict=True)]
    np.testing.assert_allclose(psnr(*ours).numpy(), expected, rtol=1e-5)
