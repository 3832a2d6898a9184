"""Image files to pixels: one set of rules, whoever reads them and whatever they lie in. No torch here.

=========================  ==========================================================================================
orientation in EXIF, XMP   applied to the pixels
transparency               composed over white
CMYK, YCCK, Lab, YCbCr     converted to RGB as Pillow does (embedded colour profiles are not applied)
16 bits per channel        the high 8 bits (value / 257, rounded)
greyscale, black/white     stays greyscale
palette                    RGB
animated, several pages    the first frame
=========================  ==========================================================================================

A file's content says what it is, not its name: collections hold PNGs called ``.jpg``. Refused is what cannot be decoded
to the last pixel, files without their end, numbers of unknown range, other formats, and more than ``MAX_PIXELS``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What is opened; the names that they usually have are in ``pipeline.core.manifest.FIELDS``."""
MAX_PIXELS = 89_478_485
"""Of an image, Pillow's limit; a larger one is not decoded, so that no file can take all memory of a worker."""
TRANSPOSED, LEFT_RIGHT, UPSIDE_DOWN = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations whose pixels are to be transposed, then mirrored, then turned upside down, to be upright."""
_END = b"\xff\xd9"
_TAG = 0x0112
_BYTES = {1: 1, 3: 2, 4: 4}
"""Of the types of whole numbers in EXIF."""
_XMP = re.compile(rb"""tiff:Orientation(?:=["']|>)([1-8])["'<]""")
_TRANSPOSE = Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM

T = TypeVar("T")


class ImageError(ValueError):
    """A file that is not taken for an image. The message says why."""


class Decoded(NamedTuple):
    """An image as it is to be seen."""

    pixels: Image.Image
    """Mode L or RGB; perhaps at a part of its size."""
    size: tuple[int, int]
    """Width and height in full."""
    changed: bool
    """Whether a decoder without the rules above would give other pixels."""


class Picture:
    """An image file whose header has been read.

    Raises:
        ImageError: not an image that can be trusted.
    """

    def __init__(self, data: bytes) -> None:
        if not data:
            raise ImageError("empty file")
        self._data = data
        self._image = _guarded(self._open)
        self.kind = "JPEG" if self._image.format == "MPO" else self._image.format or ""
        """One of ``FORMATS``. Pillow calls some JPEGs MPO (several pictures in one file); the first one is used."""
        self.size: tuple[int, int] = self._image.size
        """Width and height as they are stored."""
        check_pixels(*self.size)
        if not _is_whole(data, self.kind):
            raise ImageError(f"truncated: the {self.kind} has no end")

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self._data), formats=FORMATS)

    def decode(self, near: int = 0) -> Decoded:
        """The pixels.

        Args:
            near: If positive, a JPEG may be decoded at a half, quarter or eighth of its size, as long as its short side
                stays at least twice this.

        Raises:
            ImageError: not an image that can be trusted.
        """
        return _guarded(lambda: self._decode(near))

    def _decode(self, near: int) -> Decoded:
        image: Any = self._image
        scale = min(image.size) / (2 * near) if near else 0
        if scale > 1:
            image.draft(None, (int(image.width / scale), int(image.height / scale)))
        image.decodermaxblock = len(self._data)  # in one piece: pieces are copied, and their edges decoded twice
        image.load()
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        turn = 1 if self.kind == "TIFF" else orientation(image.info.get("exif"), xmp)  # Pillow turns TIFFs itself
        pixels, changed = _normalized(image)
        for wanted, method in zip((TRANSPOSED, LEFT_RIGHT, UPSIDE_DOWN), _TRANSPOSE, strict=True):
            pixels = pixels.transpose(method) if turn in wanted else pixels
        size = self.size[::-1] if turn in TRANSPOSED else self.size
        return Decoded(pixels, (size[0], size[1]), changed or animated or turn != 1)


def _guarded(action: Callable[[], T]) -> T:
    """What ``action`` gives; whatever the damage of a file leads a decoder to raise becomes an ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            return action()
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("not an image in a known format") from error
    except Exception as error:
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def check_pixels(width: int, height: int) -> None:
    """Raise ImageError for an image that is too large to decode."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"too many pixels: {width} x {height}, most is {MAX_PIXELS:,}")


def _is_whole(data: bytes, kind: str) -> bool:
    """Whether a file has its end, which decoders do not always miss."""
    if kind == "JPEG":
        return jpeg_is_whole(data)
    if kind == "PNG":
        return data.rfind(b"IEND") >= 0
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return kind != "GIF" or data.rstrip(b"\0").endswith(b";")


def jpeg_is_whole(data: bytes | memoryview) -> bool:
    """Whether the last scan of a JPEG file has its end; what comes after that does not matter."""
    if data[-2:] == _END:
        return True
    data = bytes(data)
    return data.rfind(_END) > data.rfind(b"\xff\xda")


def jpeg_orientation(data: bytes | memoryview) -> int:
    """The orientation that a JPEG file's EXIF or XMP states; see :func:`orientation`."""
    exif = xmp = b""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # markers may be filled up with these
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if data[at + 1] == 0xE1:
            body = bytes(data[at + 4 : end])
            exif = exif or (body if body.startswith(b"Exif\0\0") else b"")
            xmp = xmp or (body if body.startswith(b"http://ns.adobe.com/xap/1.0/\0") else b"")
        at = end
    return orientation(exif, xmp)


def orientation(exif: object, xmp: object) -> int:
    """The orientation, 1 to 8, that a block of EXIF states, or else one of XMP; 1 where that is missing or nonsense.

    Read here and not by Pillow, which looks through all of the blocks for it and fails at whatever is odd there.

    Args:
        exif: Bytes; anything else, as Pillow gives of a PNG with a text of this name, states none.
        xmp: Bytes or text.
    """
    found = _in_exif(exif) if isinstance(exif, bytes) else 0
    if not found and isinstance(xmp, (bytes, str)):
        match = _XMP.search(xmp if isinstance(xmp, bytes) else xmp.encode("utf-8", "replace"))
        found = int(match[1]) if match else 0
    return found or 1


def _in_exif(exif: bytes) -> int:
    """The orientation, 0 where it is missing or nonsense."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if exif[:2] not in (b"II", b"MM"):
        return 0
    order = "little" if exif[:2] == b"II" else "big"
    table = int.from_bytes(exif[4:8], order)
    entries = int.from_bytes(exif[table : table + 2], order)
    for at in range(table + 2, min(table + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind = (int.from_bytes(exif[i : i + 2], order) for i in (at, at + 2))
        if tag == _TAG:
            value = int.from_bytes(exif[at + 8 : at + 8 + _BYTES.get(kind, 0)], order)
            return value if value in range(1, 9) and any(exif[at + 4 : at + 8]) else 0
    return 0


def _normalized(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as L or RGB, as it is stored, and whether that is not what a plain decoder would see."""
    if image.mode.startswith("I"):
        return _high_byte(image), True
    if image.mode == "F":
        raise ImageError("a floating-point image: its range is not known")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), True
    if image.mode in ("L", "RGB"):
        return image, False
    return image.convert("L" if image.mode == "1" else "RGB"), image.mode not in ("1", "P")


def _high_byte(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError("a 32-bit image: its range is not known")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
