"""Drops on the lens against OpenCV, with whose functions ImageNet-C was made."""

import numpy as np
import pytest
import torch

from pipeline.core.random import SampleRandom
from pipeline.nn.common_corruptions import SEVERITIES, corrupted
from pipeline.nn.common_corruptions.filters import smooth
from pipeline.nn.common_corruptions.spatter import edges
from tests.unit.nn.test_common_corruptions import SIDE, Heard, blurred, picture

cv2 = pytest.importorskip("cv2", reason="needs the extra 'parity'")


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_edges_are_opencvs(sigma):
    draw = SampleRandom(0, "x", torch.zeros(1, dtype=torch.int64), torch.tensor([sigma]))
    levels = (smooth(0.5 + draw.normal(1, 90, 70) * 0.3 * sigma, sigma)[0, 0].clamp(0, 1) * 255).byte().numpy()
    expected = cv2.Canny(levels, 50, 150) > 0
    assert 0.01 < expected.mean() < 0.9 and np.array_equal(edges(levels), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_drops_are_those_that_opencv_makes(severity):
    """The authors' steps, written down with OpenCV's functions."""
    heard, image = Heard(), picture()
    found = corrupted(image, "spatter", severity, heard)[0].permute(1, 2, 0).numpy().astype(int)
    x = image[0].permute(1, 2, 0).numpy() / 255
    mean, std, sigma, least, amount = [
        (0.65, 0.3, 4, 0.69, 0.6), (0.65, 0.3, 3, 0.68, 0.6), (0.65, 0.3, 2, 0.68, 0.5), (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    ][severity - 1]  # fmt: skip
    liquid = blurred(mean + std * heard.kept[0].reshape(SIDE, SIDE), sigma)
    liquid[liquid < least] = 0
    if severity <= 3:
        levels = (liquid * 255 + 1e-3).astype(np.uint8)
        far = cv2.distanceTransform(255 - cv2.Canny(levels, 50, 150), cv2.DIST_L2, 5)
        near = cv2.equalizeHist(cv2.blur(np.minimum(far, 20), (3, 3)).astype(np.uint8))
        lit = cv2.filter2D(near, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
        light = levels * cv2.blur(lit, (3, 3)).astype(float)
        made = x + (amount * light / light.max())[..., None] * np.array([175, 238, 238]) / 255
    else:
        mud = blurred((liquid > least).astype(float), amount)
        mud[mud < 0.8] = 0
        made = x * (1 - mud[..., None]) + mud[..., None] * np.array([63, 42, 20]) / 255
    off = np.abs(found - np.floor(np.clip(made, 0, 1) * 255 + 1e-3))
    assert off.max() <= 1 and off.mean() < 0.01
