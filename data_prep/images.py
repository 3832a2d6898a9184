"""Images as they come, checked, and as they are stored.

What is stored is what every decoder reads the same way: ``pipeline/core/image.py`` says how odd images are read and
which are refused. With ``format="keep"`` the input's bytes are stored whenever none of its rules changes the pixels and
the format is JPEG, PNG or WebP; otherwise the result is stored as JPEG (from JPEG) or PNG (from anything else).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image

from data_prep.options import ImageOptions
from data_prep.record import Rejected
from pipeline.core.image import Decoded, ImageError, Picture

_KEEPS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
Check = Callable[[tuple[int, int]], None]


class Stored(NamedTuple):
    """An image ready to be written."""

    extension: str
    data: bytes
    pixels: Image.Image
    """The decoded image, mode L or RGB, before lossy encoding."""


def decode(data: bytes, near: int = 0, check: Check = lambda size: None) -> tuple[Decoded, str]:
    """Fully decode an image file, by the rules of ``pipeline/core/image.py``. Returns it and its format.

    Args:
        data: The file's content.
        near: See :meth:`Picture.decode`.
        check: Called with the width and height, as they are stored, before any pixel is decoded; may raise Rejected.

    Raises:
        Rejected: not an image that can be trusted.
    """
    try:
        picture = Picture(data)
        check(picture.size)
        return picture.decode(near), picture.kind
    except ImageError as error:
        raise Rejected(str(error)) from error


def resize(image: Image.Image, size: tuple[int, int], options: ImageOptions) -> Image.Image:
    """Bicubic, with whole-number averaging first where the image is much larger.

    Args:
        image: The pixels, perhaps decoded at a part of their size.
        size: Width and height in full.
        options: What is asked for.
    """
    side = (max if options.resize == "long" else min)(size)
    fits = side == options.size and (options.resize != "crop" or size[0] == size[1])
    if options.resize == "none" or fits or (side < options.size and not options.enlarge):
        return image
    if options.resize == "crop":
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2  # whole pixels: nothing is interpolated
        box, target = (left, top, left + short, top + short), (options.size, options.size)
    else:
        box, target = None, (max(1, round(size[0] * options.size / side)), max(1, round(size[1] * options.size / side)))
    return image.resize(target, Image.Resampling.BICUBIC, box, reducing_gap=2.0)


def encode(image: Image.Image, extension: str, quality: int) -> bytes:
    """The image as a file. Nothing but the pixels goes in.

    Raises:
        Rejected: the format cannot hold it; WebP ends at 16,383 pixels, JPEG at 65,500.
    """
    target = io.BytesIO()
    image.info = {}  # comments, resolution and profiles would be written too
    try:
        if extension == "jpg":
            image.save(target, "JPEG", quality=quality)
        elif extension == "webp":
            image.save(target, "WEBP", quality=quality, method=4)
        else:
            image.save(target, "PNG", compress_level=4)
    except (OSError, ValueError) as error:
        raise Rejected(f"{image.width} x {image.height} pixels cannot be stored as {extension}: {error}") from error
    return target.getvalue()


def store(data: bytes, options: ImageOptions, check: Check = lambda size: None) -> Stored:
    """Check an image (see :func:`decode`) and bring it into the form that is stored.

    Raises:
        Rejected: it cannot be used.
    """
    near = options.size if options.resize in ("short", "crop") else 0
    (pixels, size, changed), kind = decode(data, near, check)
    if options.format == "keep":
        if not changed and kind in _KEEPS:
            return Stored(_KEEPS[kind], data, pixels)
        extension = "jpg" if kind == "JPEG" else "png"
    else:
        extension = options.format
        pixels = resize(pixels, size, options)
    return Stored(extension, encode(pixels, extension, options.quality), pixels)
