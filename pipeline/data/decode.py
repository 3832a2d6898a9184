"""From the bytes of a sample to the arrays of a batch: geometry on uint8 here, colour later on the device.

Shape letters: B samples, H and W height and width of the result, h and w those of the stored image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.config.schema import Image
from pipeline.core.random import SampleRandom

_TRIES = 10
_JPEG = b"\xff\xd8\xff"


class Box(NamedTuple):
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Geometry(NamedTuple):
    """Random numbers of one view of one sample."""

    crop: Sequence[float]
    """Uniform, 2 for the place and 2 for each try of the shape."""
    mirror: bool


def decode_rgb(data: memoryview) -> Tensor:
    """An image file as uint8[3,h,w].

    Raises:
        ValueError: not a readable image.
    """
    if bytes(data[:3]) == _JPEG:
        try:
            return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"not a readable JPEG ({str(error).splitlines()[0]})") from error
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            has_palette_alpha = image.mode == "P" and "transparency" in image.info
            rgb = (image.convert("RGBA") if has_palette_alpha else image).convert("RGB")
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def random_box(size: tuple[int, int], image: Image, numbers: Sequence[float]) -> Box:
    """The crop of torchvision's RandomResizedCrop (Szegedy et al., 2014) for given uniform numbers.

    Args:
        size: height and width of the stored image.
        image: ``scale`` and ``ratio``.
        numbers: see :class:`Geometry`.
    """
    h, w = size
    low, high = (math.log(r) for r in image.ratio)
    for i in range(_TRIES):
        area = h * w * (image.scale[0] + (image.scale[1] - image.scale[0]) * numbers[2 + 2 * i])
        ratio = math.exp(low + (high - low) * numbers[3 + 2 * i])
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= w and 0 < height <= h:
            return Box(int(numbers[0] * (h - height + 1)), int(numbers[1] * (w - width + 1)), height, width)
    # No shape fits: the whole image, cut in its middle to the nearest ratio allowed.
    ratio = min(max(w / h, image.ratio[0]), image.ratio[1])
    width, height = min(w, round(h * ratio)), min(h, round(w / ratio))
    return Box((h - height) // 2, (w - width) // 2, height, width)


def resize(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """uint8[3,h,w] to uint8[3,H,W]: bicubic with antialiasing, in fixed point, as Pillow does it."""
    return F.interpolate(pixels.unsqueeze(0), shape, mode="bicubic", antialias=True).squeeze(0)


def center(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize so that the shape is just covered, and cut its middle out: torchvision's Resize and CenterCrop."""
    (h, w), (height, width) = pixels.shape[1:], shape
    factor = max(height / h, width / w)
    covering = (max(height, int(h * factor)), max(width, int(w * factor)))
    resized = resize(pixels, covering)
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    return resized[:, top : top + height, left : left + width]


class ImageDecoder:
    """Images of a batch, with random numbers that belong to the samples.

    Args:
        image: size, kind of crop, flip and number of views.
        seed: seed of the run.
    """

    def __init__(self, image: Image, seed: int) -> None:
        self._image = image
        self._seed = seed
        self.names = ["image", "image2"][: image.views]

    def geometry(self, epoch: Tensor, sample: Tensor) -> list[list[Geometry]]:
        """Random numbers for B samples: for each sample, for each view.

        Args:
            epoch: int64[B].
            sample: int64[B].
        """
        views = []
        for name in self.names:
            crop = SampleRandom(self._seed, f"data.crop.{name}", epoch, sample).uniform(2 + 2 * _TRIES).tolist()
            coin = SampleRandom(self._seed, f"data.flip.{name}", epoch, sample).uniform().tolist()
            views.append([Geometry(c, self._image.flip and m < 0.5) for c, m in zip(crop, coin, strict=True)])
        return [list(views) for views in zip(*views, strict=True)]

    def decode(self, data: memoryview, geometry: list[Geometry]) -> list[Tensor]:
        """One stored image to its views, each uint8[3,H,W].

        Raises:
            ValueError: not a readable image.
        """
        pixels = decode_rgb(data)
        return [self._view(pixels, view) for view in geometry]

    def _view(self, pixels: Tensor, view: Geometry) -> Tensor:
        shape, crop = self._image.shape, self._image.crop
        if crop == "center":
            return center(pixels, shape)
        if crop == "resize":
            return resize(pixels, shape)
        box = random_box((pixels.shape[1], pixels.shape[2]), self._image, view.crop)
        window = pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]
        resized = resize(window, shape)
        return resized.flip(-1) if view.mirror else resized


def decode_label(data: memoryview, classes: int) -> int:
    """A class number written in decimal.

    Raises:
        ValueError: not a number, or not of one of ``classes`` (0: any).
    """
    text = bytes(data).strip()
    if not text.isdigit():
        raise ValueError(f"label {text[:40]!r} is not a number")
    label = int(text)
    if classes and label >= classes:
        raise ValueError(f"label {label} is not one of the {classes} classes")
    return label
