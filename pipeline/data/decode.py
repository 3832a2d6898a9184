"""From the bytes of a sample to the arrays of a batch: geometry on uint8 here, colour later on the device.

Shape letters: B samples, H and W height and width of the result, h and w those of the stored image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.schema import Image
from pipeline.core.image import LEFT_RIGHT, TRANSPOSED, UPSIDE_DOWN, ImageError, Picture, jpeg_orientation
from pipeline.core.random import SampleRandom
from pipeline.data.jpeg import MAGIC, Box, Jpeg

_TRIES = 10


Resize = Callable[[Tensor, tuple[int, int]], Tensor]
"""[C,h,w] to [C,H,W]."""


class Geometry(NamedTuple):
    """Random numbers of one view of one sample."""

    crop: Sequence[float]
    """Uniform, 2 for the place and 2 for each try of the shape."""
    mirror: bool


class Stored(Protocol):
    """An image file of which windows can be decoded."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def window(self, box: Box) -> Tensor:
        """uint8[3,h,w], the pixels of a window."""
        ...


class Pixels:
    """A decoded image, or a mask.

    Args:
        pixels: [C,h,w].
    """

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self.size = (pixels.shape[1], pixels.shape[2])

    def window(self, box: Box) -> Tensor:
        """See :class:`Stored`."""
        return cut(self._pixels, box)


class _Other(Pixels):
    """An image file that is decoded as a whole by Pillow."""

    def __init__(self, data: memoryview) -> None:
        try:
            rgb = Picture(bytes(data)).decode().pixels.convert("RGB")
        except ImageError as error:
            raise ValueError(f"not a readable image ({error})") from error
        pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        super().__init__(pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1))


class _Turned:
    """An image file as EXIF says that it is to be seen.

    Args:
        stored: as it is stored.
        orientation: 2 to 8, see ``core/image.py``.
    """

    def __init__(self, stored: Stored, orientation: int) -> None:
        self._stored = stored
        self._transposed = orientation in TRANSPOSED
        self._flips = (orientation in UPSIDE_DOWN, orientation in LEFT_RIGHT)
        h, w = stored.size
        self.size = (w, h) if self._transposed else (h, w)

    def window(self, box: Box) -> Tensor:
        top, left, height, width = box
        top = self.size[0] - top - height if self._flips[0] else top
        left = self.size[1] - left - width if self._flips[1] else left
        if self._transposed:
            pixels = self._stored.window(Box(left, top, width, height)).transpose(1, 2)
        else:
            pixels = self._stored.window(Box(top, left, height, width))
        return pixels.flip([axis for axis, flipped in zip((1, 2), self._flips, strict=True) if flipped])


def turned(stored: Stored, file: memoryview) -> Stored:
    """A JPEG file's pixels as its EXIF says that they are to be seen."""
    orientation = jpeg_orientation(file)
    return stored if orientation == 1 else _Turned(stored, orientation)


def open_image(data: memoryview) -> Stored:
    """An image file by its content, by the rules of ``core/image.py``.

    Raises:
        ValueError: not a readable image.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        return _Other(data)
    jpeg = Jpeg(data)
    # Of four colours the library does not always know which of them are stored the wrong way round.
    return turned(jpeg, data) if jpeg.colours < 4 else _Other(data)


def cut(pixels: Tensor, box: Box) -> Tensor:
    """A window of pixels, [3,h,w]."""
    return pixels[:, box.top : box.top + box.height, box.left : box.left + box.width]


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all."""
    top, left = min(b.top for b in boxes), min(b.left for b in boxes)
    bottom, right = max(b.top + b.height for b in boxes), max(b.left + b.width for b in boxes)
    return Box(top, left, bottom - top, right - left)


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
    return Box((h - height) // 2, (w - width) // 2, max(height, 1), max(width, 1))


def resize(pixels: Tensor, shape: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """uint8[3,h,w] to uint8[3,H,W] with antialiasing, on the CPU in fixed point, as Pillow does it."""
    if pixels.device.type == "cpu":
        return F.interpolate(pixels.unsqueeze(0), shape, mode=mode, antialias=True).squeeze(0)
    resized = F.interpolate(pixels.unsqueeze(0).float(), shape, mode=mode, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8).squeeze(0)


def nearest(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """[C,h,w] to [C,H,W]: each pixel has the value of the stored one that its centre lies in."""
    rows, columns = (
        ((2 * torch.arange(there) + 1) * here // (2 * there))
        for here, there in zip(pixels.shape[1:], shape, strict=True)
    )
    return pixels[:, rows[:, None], columns]


def center(pixels: Tensor, shape: tuple[int, int], fraction: float = 1.0, resize: Resize = resize) -> Tensor:
    """Resize so that ``shape / fraction`` is just covered, and cut the middle out: torchvision's Resize, CenterCrop."""
    (h, w), (height, width) = pixels.shape[1:], shape
    tall, wide = round(height / fraction), round(width / fraction)
    factor = max(tall / h, wide / w)
    covering = (max(tall, int(h * factor)), max(wide, int(w * factor)))
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    return cut(resize(pixels, covering), Box(top, left, height, width))


class ImageDecoder:
    """Images of a batch, with random numbers that belong to the samples.

    Args:
        image: size, kind of crop, flip and views.
        seed: seed of the run.
    """

    def __init__(self, image: Image, seed: int) -> None:
        self._image = image
        self._seed = seed
        self._resize = partial(resize, mode=image.interpolation)
        self.each = image.each
        """The geometry of each view."""
        self.names = list(self.shapes("image"))

    def shapes(self, first: str) -> dict[str, tuple[int, int]]:
        """Name, height and width of each view: "image", "image2", "image3", ... where the first is called "image"."""
        return {f"{first}{number if number > 1 else ''}": view.shape for number, view in enumerate(self.each, 1)}

    def geometry(self, epoch: Tensor, sample: Tensor) -> list[list[Geometry]]:
        """Random numbers for B samples: for each sample, for each view.

        Args:
            epoch: int64[B].
            sample: int64[B].
        """
        views = []
        for name, view in zip(self.names, self.each, strict=True):
            crop = SampleRandom(self._seed, f"data.crop.{name}", epoch, sample).uniform(2 + 2 * _TRIES).tolist()
            coin = SampleRandom(self._seed, f"data.flip.{name}", epoch, sample).uniform().tolist()
            views.append([Geometry(c, view.flip and m < 0.5) for c, m in zip(crop, coin, strict=True)])
        return [list(views) for views in zip(*views, strict=True)]

    def decode(self, data: memoryview, geometry: Sequence[Geometry]) -> list[Tensor]:
        """One stored image to its views, each uint8[3,H,W].

        Raises:
            ValueError: not a readable image.
        """
        return self.views(open_image(data), geometry)

    def views(self, stored: Stored, geometry: Sequence[Geometry], resize: Resize | None = None) -> list[Tensor]:
        """The views of an image whose header has been read; it is decoded once.

        Args:
            stored: the image.
            geometry: for each view.
            resize: what makes [C,H,W] of [C,h,w]; None: as images are resized.

        Raises:
            ValueError: not a readable image.
        """
        image, resize = self._image, resize or self._resize
        if image.crop != "random_resized":
            whole = stored.window(Box(0, 0, *stored.size))
            centred = image.crop == "center"
            view = center(whole, image.shape, image.crop_fraction, resize) if centred else resize(whole, image.shape)
            return [view] * len(geometry)
        boxes = [random_box(stored.size, view, drawn.crop) for view, drawn in zip(self.each, geometry, strict=True)]
        around = _around(boxes)
        pixels, views = stored.window(around), []
        for box, view, drawn in zip(boxes, self.each, geometry, strict=True):
            inside = Box(box.top - around.top, box.left - around.left, box.height, box.width)
            resized = resize(cut(pixels, inside), view.shape)
            views.append(resized.flip(-1) if drawn.mirror else resized)
        return views
