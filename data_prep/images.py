"""Images as they come, checked, and as they are stored.

What is stored is what every decoder reads the same way:

========================  ==========================================================================================
orientation in EXIF       applied to the pixels
transparency              composed over white
CMYK, YCCK, Lab, YCbCr    converted to RGB (embedded colour profiles are not applied)
16 bits per channel       the high 8 bits (value / 257, rounded)
greyscale, black/white    stays greyscale
palette                   RGB
animated                  the first frame
========================  ==========================================================================================

With ``format="keep"`` the input's bytes are stored whenever none of this changes the pixels and the format is JPEG,
PNG or WebP; otherwise the result is stored as JPEG (from JPEG) or PNG (from anything else).

Rejected: what cannot be decoded to the last pixel, files without their end, formats other than JPEG, PNG, WebP, GIF,
BMP and TIFF, names that claim another format, and more than 89 million pixels (Pillow's limit against bombs).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data_prep.options import ImageOptions
from data_prep.record import Rejected

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened. Pillow calls some JPEGs MPO (several pictures in one file); the first one is used."""
EXTENSIONS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
"""What a file's extension claims it to be."""
_KEEPS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112


class Stored(NamedTuple):
    """An image ready to be written."""

    extension: str
    data: bytes
    pixels: Image.Image
    """The decoded image, mode L or RGB, before lossy encoding."""


def load(
    data: bytes, claimed: str = "", near: int = 0, check: Callable[[tuple[int, int]], None] = lambda size: None
) -> tuple[Image.Image, tuple[int, int]]:
    """Open and fully decode an encoded image. Returns it and its width and height in full.

    Args:
        data: The file's content.
        claimed: Extension of its name, in lower case; empty when nothing is claimed.
        near: If positive, a JPEG may be decoded at a half, quarter or eighth of its size, as long as its short side
            stays at least twice this.
        check: Called with the width and height, as they are stored, before any pixel is decoded; may raise Rejected.

    Raises:
        Rejected: not an image that can be trusted.
    """
    if not data:
        raise Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_container(data, image.format or "", claimed)
            size = image.size
            check(size)
            if near:
                scale = min(image.size) / (2 * near)
                if scale > 1:
                    image.draft(None, (int(image.width / scale), int(image.height / scale)))
            image.decodermaxblock = len(data)  # in one piece: pieces are copied, and their edges decoded twice
            image.load()
            return image, size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Rejected(f"too many pixels: {error}") from error
    except (Rejected, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise Rejected("not an image in a known format") from error
    except Exception as error:  # decoders raise whatever the damage leads them to
        raise Rejected(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _check_container(data: bytes, kind: str, claimed: str) -> None:
    """Raise Rejected when the name lies or the end is missing, which Pillow does not always notice."""
    kind = "JPEG" if kind == "MPO" else kind
    expected = EXTENSIONS.get(claimed)
    if claimed and expected != kind:
        raise Rejected(f"disguised: named .{claimed}, holds {kind}")
    whole = {
        "JPEG": lambda: data.endswith(b"\xff\xd9") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda"),
        "PNG": lambda: data.rfind(b"IEND") >= 0,
        "WEBP": lambda: int.from_bytes(data[4:8], "little") + 8 <= len(data),
        "GIF": lambda: data.rstrip(b"\0").endswith(b";"),
    }
    if kind in whole and not whole[kind]():
        raise Rejected(f"truncated: the {kind} has no end")


def normalize(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as L or RGB, as the table above says, and whether that changed what a plain decoder would see.

    Raises:
        Rejected: numbers of unknown range.
    """
    changed = _orientation(image) != 1 or (getattr(image, "is_animated", False) and image.format != "MPO")
    if changed:
        image = ImageOps.exif_transpose(image)
    transparent = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if image.mode.startswith("I"):
        return _high_byte(image), True
    if image.mode == "F":
        raise Rejected("a floating-point image: its range is not known")
    if transparent:
        return _over_white(image), True
    if image.mode in ("L", "RGB"):
        return image, changed
    return image.convert("L" if image.mode == "1" else "RGB"), changed or image.mode not in ("1", "P")


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, 1 to 8; 1 where it is missing or nonsense."""
    if image.format in ("JPEG", "WEBP") and not {"exif", "xmp"} & image.info.keys():
        return 1  # as most are; reading EXIF that is not there takes a twentieth of a millisecond
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _high_byte(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise Rejected("a 32-bit image: its range is not known")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
    """The image as a file. Nothing but the pixels goes in."""
    target = io.BytesIO()
    image.info = {}  # comments, resolution and profiles would be written too
    if extension == "jpg":
        image.save(target, "JPEG", quality=quality)
    elif extension == "webp":
        image.save(target, "WEBP", quality=quality, method=4)
    else:
        image.save(target, "PNG", compress_level=4)
    return target.getvalue()


def store(
    data: bytes, claimed: str, options: ImageOptions, check: Callable[[tuple[int, int]], None] = lambda size: None
) -> Stored:
    """Check an image (see :func:`load`) and bring it into the form that is stored.

    Raises:
        Rejected: it cannot be used.
    """
    near = options.size if options.resize in ("short", "crop") else 0
    image, size = load(data, claimed, near, check)
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    if _orientation(image) >= 5:
        size = (size[1], size[0])
    pixels, changed = normalize(image)
    if options.format == "keep":
        if not changed and kind in _KEEPS:
            return Stored(_KEEPS[kind], data, pixels)
        extension = "jpg" if kind == "JPEG" else "png"
    else:
        extension = options.format
        pixels = resize(pixels, size, options)
    return Stored(extension, encode(pixels, extension, options.quality), pixels)
