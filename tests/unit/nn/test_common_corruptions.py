"""Corruptions against a plain transcription of the authors' ``make_imagenet_c.py``, an image at a time, in float64.

Both get the same random numbers. A level of 255 may differ where a number is cut off; no more.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.stats import poisson

from pipeline.core.random import SampleRandom
from pipeline.nn.common_corruptions import EXTRA, KNOWN, SEVERITIES, STANDARD, corrupted
from pipeline.nn.common_corruptions.digital import saturate

SIDE = 224


def draw(*ids: int) -> SampleRandom:
    return SampleRandom(3, "a test", torch.zeros(len(ids), dtype=torch.int64), torch.tensor(ids))


class Heard:
    """Gives a sample's numbers and keeps them, in the order of asking."""

    def __init__(self) -> None:
        self.source, self.kept = draw(5), []

    def keep(self, numbers):
        self.kept.append(numbers[0].numpy().astype(np.float64 if numbers.is_floating_point() else np.int64))
        return numbers

    def uniform(self, *shape):
        return self.keep(self.source.uniform(*shape))

    def normal(self, *shape):
        return self.keep(self.source.normal(*shape))

    def integers(self, low, high, *shape):
        return self.keep(self.source.integers(low, high, *shape))


def picture(side: int = SIDE, seed: int = 0, count: int = 1) -> torch.Tensor:
    """Coarse and fine colours, a black and a white corner, some grey: uint8[count,3,side,side]."""
    r = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = np.array(Image.fromarray(r.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((side, side)))
        fine = r.integers(-40, 40, (side, side, 3)) * (np.arange(side) % 32 < 16)[:, None, None]
        image = np.clip(coarse.astype(int) + fine, 0, 255)
        image[: side // 8, : side // 8], image[-side // 8 :, -side // 8 :] = 0, 255
        image[-side // 8 :, : side // 8] = image[-side // 8 :, : side // 8].mean(axis=2, keepdims=True)
        images.append(image.astype(np.uint8))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def last(x):
    """Channels last, as the authors have images."""
    return x.transpose(1, 2, 0)


def blurred(x, sigma, mode="nearest", truncate=4.0):
    return ndimage.gaussian_filter(x, [sigma, sigma, 0] if x.ndim == 3 else sigma, mode=mode, truncate=truncate)


def zoomed(x, factor):
    n = math.ceil(SIDE / factor)
    top = (SIDE - n) // 2
    big = ndimage.zoom(x[top : top + n, top : top + n], (factor, factor, 1), order=1)
    trim = (len(big) - SIDE) // 2
    return big[trim : trim + SIDE, trim : trim + SIDE]


def moved(x, radius, sigma, degrees):
    """ImageMagick: a half Gaussian along the line, at whole pixels, the edge going on."""
    taps = 2 * radius + 1
    weight = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    weight, total = weight / weight.sum(), np.zeros_like(x)
    for i in range(taps):
        dy = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        dx = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        rows, columns = (np.clip(np.arange(SIDE) + d, 0, SIDE - 1) for d in (dy, dx))
        total += weight[i] * x[rows][:, columns]
    return total


def diamond_square(decay, numbers, size=256):
    land, step, wibble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2
        for kind in ("square", "across", "down"):
            for i in range(size // step):
                for j in range(size // step):
                    y, x = i * step, j * step
                    if kind == "square":
                        place, four = (y + half, x + half), ((y, x), (y + step, x), (y, x + step), (y + step, x + step))
                    elif kind == "across":
                        place = (y, x + half)
                        four = ((y, x), (y, x + step), (y + half, x + half), (y - half, x + half))
                    else:
                        place = (y + half, x)
                        four = ((y, x), (y + step, x), (y + half, x + half), (y + half, x - half))
                    number = numbers[{"square": 0, "across": 1, "down": 2}[kind]][i, j]
                    around = sum(land[a % size, b % size] for a, b in four) / 4
                    land[place] = around + wibble * (2 * wibble * number - wibble)
        numbers, step, wibble = numbers[3:], half, wibble / decay
    land -= land.min()
    return land / land.max()


def hsv(x, change):
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    return hsv_to_rgb(change(rgb_to_hsv(x)))


def of_value(c):
    return lambda x: np.dstack([x[..., 0], x[..., 1], np.clip(x[..., 2] + c, 0, 1)])


def of_saturation(a, b):
    return lambda x: np.dstack([x[..., 0], np.clip(x[..., 1] * a + b, 0, 1), x[..., 2]])


def gaussian_noise(x, s, q):
    return x + last(q[0]) * [0.08, 0.12, 0.18, 0.26, 0.38][s]


def shot_noise(x, s, q):
    c = [60, 25, 12, 5, 3][s]
    return poisson.ppf(last(q[0]), x * c).clip(0) / c


def impulse_noise(x, s, q):
    hit, salt = last(q[0]) < [0.03, 0.06, 0.09, 0.17, 0.27][s], last(q[1]) < 0.5
    return np.where(hit, np.where(salt, 1.0, 0.0), x)


def speckle_noise(x, s, q):
    return x + x * last(q[0]) * [0.15, 0.2, 0.35, 0.45, 0.6][s]


def gaussian_blur(x, s, q):
    return blurred(x, [1, 2, 3, 4, 6][s])


def glass_blur(x, s, q):
    sigma, reach, times = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][s]
    x = np.uint8(blurred(x, sigma) * 255 + 1e-9)
    for t in range(times):
        moves = iter(q[t].reshape(-1, 2).tolist())
        for h in range(SIDE - reach, reach, -1):
            for w in range(SIDE - reach, reach, -1):
                dx, dy = next(moves)
                x[h, w] = x[h + dy, w + dx]
    return blurred(x / 255.0, sigma)


def defocus_blur(x, s, q):
    radius, soft = [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)][s]
    place = np.arange(-max(radius, 8), max(radius, 8) + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(float)
    disk /= disk.sum()
    size = 1 if radius <= 8 else 2
    tap = np.exp(-(np.arange(-size, size + 1) ** 2) / (2 * soft**2))
    disk = ndimage.correlate(disk, np.outer(tap, tap) / tap.sum() ** 2, mode="mirror")
    return np.dstack([ndimage.correlate(x[..., c], disk, mode="mirror") for c in range(3)])


def motion_blur(x, s, q):
    return moved(x, *[(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)][s], -45 + 90 * float(q[0][0]))


def zoom_blur(x, s, q):
    c = [
        np.arange(1, end, step) for end, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    ]
    return (x + sum(zoomed(x, factor) for factor in c[s])) / (len(c[s]) + 1)


def snow(x, s, q):
    c = [(0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)][s]  # fmt: skip
    layer = zoomed(c[0] + c[1] * q[0][0][..., None], c[2])
    layer[layer < c[3]] = 0
    layer = np.uint8(np.clip(layer, 0, 1) * 255) / 255.0
    layer = np.uint8(moved(layer, c[4], c[5], -135 + 90 * float(q[1][0])) * 255 + 1e-9) / 255.0
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return c[6] * x + (1 - c[6]) * np.maximum(x, grey * 1.5 + 0.5) + layer + np.rot90(layer, k=2)


def fog(x, s, q):
    amount, decay = [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)][s]
    land = diamond_square(decay, q[1:])[:SIDE, :SIDE, None]  # the first number is not used
    return (x + amount * land) * x.max() / (x.max() + amount)


def brightness(x, s, q):
    return hsv(x, of_value([0.1, 0.2, 0.3, 0.4, 0.5][s]))


def saturated(x, s, q):
    return hsv(x, of_saturation(*[(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)][s]))


def contrast(x, s, q):
    mean = x.mean(axis=(0, 1))
    return (x - mean) * [0.4, 0.3, 0.2, 0.1, 0.05][s] + mean


def elastic_transform(x, s, q):
    c = [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)][s]
    centre, third = np.float64([SIDE // 2, SIDE // 2]), SIDE // 3
    points = np.float64([centre + third, [centre[0] + third, centre[1] - third], centre - third])
    there = points + c[2] * (2 * q[0] - 1)
    back = np.linalg.solve(np.c_[there, np.ones(3)], points)
    y, xs = np.mgrid[:SIDE, :SIDE].astype(float)
    came = np.dstack([xs, y, np.ones_like(y)]) @ back
    first = [ndimage.map_coordinates(x[..., k], [came[..., 1], came[..., 0]], order=1, mode="mirror") for k in range(3)]
    dx, dy = (blurred(2 * u[0] - 1, c[1], "reflect", 3) * c[0] for u in q[1:])
    return np.dstack([ndimage.map_coordinates(f, [y + dy, xs + dx], order=1, mode="reflect") for f in first])


def pixelate(x, s, q):
    c = [0.6, 0.5, 0.4, 0.3, 0.25][s]
    small = Image.fromarray(np.uint8(x * 255 + 0.5)).resize((int(SIDE * c), int(SIDE * c)), Image.Resampling.BOX)
    return np.array(small.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255


def jpeg_compression(x, s, q):
    file = io.BytesIO()
    Image.fromarray(np.uint8(x * 255 + 0.5)).save(file, "JPEG", quality=[25, 18, 15, 10, 7][s])
    return np.array(Image.open(file)) / 255


BY_HAND = {f.__name__: f for f in (
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, fog, brightness,
    contrast, elastic_transform, pixelate, jpeg_compression, speckle_noise, gaussian_blur,
)} | {"saturate": saturated}  # fmt: skip
"""All but frost, which is ours, and spatter, which is held against OpenCV in tests/parity."""


def test_the_names_are_those_of_imagenet_c():
    assert len(STANDARD) == 15 and len(EXTRA) == 4 and set(KNOWN) - set(BY_HAND) == {"frost", "spatter"}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", BY_HAND)
def test_equals_the_transcription(name, severity):
    heard, image = Heard(), picture()
    found = corrupted(image, name, severity, heard)[0].permute(1, 2, 0).numpy().astype(int)
    x = image[0].permute(1, 2, 0).numpy() / 255
    made = np.clip(BY_HAND[name](x, severity - 1, heard.kept), 0, 1) * 255
    off = np.abs(found - np.floor(made + 1e-3))
    assert off.max() <= 1 and off.mean() < 0.01, (off.max(), off.mean())
    assert np.abs(found - x * 255).mean() > 1


@pytest.mark.parametrize("name", KNOWN)
def test_an_image_is_damaged_alike_in_any_batch(name):
    """One by one, in another order, and beside others; and another image is damaged otherwise where there is chance."""
    images, ids = picture(64, count=3), [7, 2, 9]
    whole = corrupted(images, name, 3, draw(*ids))
    for order in ([0], [2, 1], [1, 0, 2]):
        part = corrupted(images[order], name, 3, draw(*(ids[i] for i in order)))
        assert torch.equal(part, whole[order])
    twice = corrupted(images[:1].repeat(2, 1, 1, 1), name, 3, draw(1, 2))
    chance = "noise" in name or name in {
        "glass_blur",
        "motion_blur",
        "snow",
        "frost",
        "fog",
        "elastic_transform",
        "spatter",
    }
    assert torch.equal(twice[0], twice[1]) == (not chance)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 32, 32), (3, 48, 30)])
def test_any_size_and_grey_images_are_damaged(name, shape):
    c, h, w = shape
    image = picture(max(h, w), count=2)[:, :c, :h, :w]
    found = corrupted(image, name, 5, draw(1, 2))
    assert found.shape == image.shape and found.dtype == torch.uint8
    assert h == 4 or not torch.equal(found, image)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "snow", "fog", "frost",
                                  "elastic_transform", "spatter", "contrast"])  # fmt: skip
def test_half_the_size_is_damaged_like_a_picture_that_is_then_halved(name):
    """Lengths grow with the image: a smooth one loses as much at 112 pixels as at 224, to within a quarter."""
    big = picture(28, seed=4).float()
    big = torch.nn.functional.interpolate(big, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    small = torch.nn.functional.interpolate(big, scale_factor=0.5, mode="area")
    lost = []
    for image in (big, small):
        image = image.round().to(torch.uint8)
        lost.append(float((corrupted(image, name, 4, draw(3)).float() - image).abs().mean()))
    assert lost[1] == pytest.approx(lost[0], rel=0.25)


def test_frost_keeps_the_shares_of_imagenet_c():
    """Where there is no ice the image has its share, and ice adds at most its own."""
    white, black = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for severity, (image, ice) in enumerate(((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), 1):
        alone = corrupted(black, "frost", severity, draw(1)).float() / 255
        assert 0.2 * ice < float(alone.mean()) < 0.8 * ice and float(alone.max()) <= ice + 1e-6
        both = corrupted(white, "frost", severity, draw(1)).float() / 255
        torch.testing.assert_close(both, (alone + image).clamp(max=1), rtol=0, atol=2.1 / 255)


def test_what_has_no_hue_becomes_reddish_as_in_scikit_image():
    grey = torch.full((1, 3, 2, 2), 0.5)
    assert saturate(grey, 4, draw(1))[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.45, 0.45])
