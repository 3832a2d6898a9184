"""Pictures as files and in a page."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

_SIDE = 1200
"""Most pixels of a side in a page."""
_ENLARGED = 640
"""Pixels of the longer side to which small pictures are enlarged, by whole factors up to four."""


def png(image: np.ndarray) -> bytes:
    """A picture, uint8[H,W,3], as a file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


class Shown(NamedTuple):
    """A saved picture."""

    name: str
    path: Path
    caption: str


class Shot(NamedTuple):
    """A picture for a page."""

    shown: Shown
    data: bytes
    width: int
    height: int


def encode(shown: Shown) -> Shot:
    """WebP, of limited width and height.

    Raises:
        OSError: no such file, or not a picture.
    """
    with Image.open(shown.path) as file:
        image = file.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=82, lossless=2 * max(image.size) <= _ENLARGED)
    return Shot(shown, data.getvalue(), image.width, image.height)


def shot(picture: Shot) -> str:
    """The picture with its name and caption, as HTML that holds it."""
    shown, data, width, height = picture
    scale = max(1, min(4, _ENLARGED // max(width, height)))
    kind = ' class="small"' if scale > 1 else ""
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure style="width:{width * scale}px"><img{kind} src="{source}" alt="{escape(shown.name)}" '
        f'width="{width * scale}" height="{height * scale}">'
        f"<figcaption><b>{escape(shown.name)}</b> {escape(shown.caption)}</figcaption></figure>"
    )
