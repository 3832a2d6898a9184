"""Pictures of what found what: images with texts beside or beneath them.

Shape letters: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 64
"""Pixels of the height that images are shown at."""
TEXT = 12
"""Pixels of a letter."""
GAP = 4
RIGHT, WRONG, PLAIN = (0, 120, 40), (160, 30, 30), (0, 0, 0)
"""Colours of what belongs together, what does not, and what is asked."""
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Line(NamedTuple):
    """A line of text."""

    text: str
    colour: Colour = PLAIN


def verdict(right: bool) -> Colour:
    """The colour of a finding."""
    return RIGHT if right else WRONG


def beside(images: Tensor, lines: Sequence[Sequence[Line]]) -> np.ndarray:
    """Each image at the left of its lines, one below the other.

    Args:
        images: uint8[B,C,H,W].
        lines: of each image.

    Returns:
        uint8[height,width,3].
    """
    font = ImageFont.load_default(TEXT)
    shown = [_enlarged(image) for image in images]
    left = max(image.width for image in shown) + 2 * GAP
    width = left + GAP + max(_width(line.text, font) for own in lines for line in own)
    height = max(SIDE, max(len(own) for own in lines) * (TEXT + GAP)) + GAP
    canvas = Image.new("RGB", (width, height * len(shown)), "white")
    for row, (image, own) in enumerate(zip(shown, lines, strict=True)):
        canvas.paste(image, (GAP, row * height))
        _write(canvas, (left, row * height), own, font)
    return np.asarray(canvas)


def beneath(titles: Sequence[str], images: Sequence[Tensor], notes: Sequence[Sequence[Line]]) -> np.ndarray:
    """Rows of images under a title, a note beneath each image.

    Args:
        titles: of each row.
        images: uint8[B,C,H,W] of each row.
        notes: of each image of each row.

    Returns:
        uint8[height,width,3].
    """
    font = ImageFont.load_default(TEXT)
    shown = [[_enlarged(image) for image in row] for row in images]
    step = GAP + max(
        max(image.width, _width(note.text, font))
        for row, own in zip(shown, notes, strict=True)
        for image, note in zip(row, own, strict=True)
    )
    width = max(max(_width(title, font) for title in titles), step * max(len(row) for row in shown)) + 2 * GAP
    height = SIDE + 2 * (TEXT + GAP) + GAP
    canvas = Image.new("RGB", (width, height * len(shown)), "white")
    for number, (title, row, own) in enumerate(zip(titles, shown, notes, strict=True)):
        top = number * height
        _write(canvas, (GAP, top), [Line(title)], font)
        for column, (image, note) in enumerate(zip(row, own, strict=True)):
            canvas.paste(image, (GAP + column * step, top + TEXT + GAP))
            _write(canvas, (GAP + column * step, top + TEXT + GAP + SIDE), [note], font)
    return np.asarray(canvas)


def _enlarged(image: Tensor) -> Image.Image:
    """uint8[C,H,W] at the height that images are shown at; pixels stay squares."""
    c, h, w = image.shape
    rgb = image.cpu().expand(3, h, w) if c == 1 else image[:3].cpu()
    picture = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    way = Image.Resampling.NEAREST if h < SIDE else Image.Resampling.BOX
    return picture.resize((max(1, round(w * SIDE / h)), SIDE), way)


def _width(text: str, font: Font) -> int:
    return int(font.getbbox(text or " ")[2]) + 1


def _write(
    canvas: Image.Image,
    place: tuple[int, int],
    lines: Sequence[Line],
    font: Font,
) -> None:
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * (TEXT + GAP)), line.text, line.colour, font)


class Match(NamedTuple):
    """Two views of images and how alike they are."""

    first: Tensor
    """uint8[B,C,H,W]."""
    second: Tensor
    """uint8[B,C,H,W]."""
    cosines: Tensor
    """float32[B,B], of first (rows) and second views."""


def pairs(match: Match) -> tuple[np.ndarray, str]:
    """Of each sample both views and, as a negative, the second view of another sample that is most like the first.

    Returns:
        uint8[height,width,3] and a caption.
    """
    cosines, count = match.cosines.float().cpu(), len(match.cosines)
    own = cosines.diagonal()
    others = cosines.masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    hardest = others.argmax(dim=1)
    found = others.gather(1, hardest[:, None]).squeeze(1)
    rows, notes = [match.first, match.second], [[Line(" ")] * count, [Line(f"{c:.2f}", RIGHT) for c in own.tolist()]]
    titles = ["one view", "the other view, and its cosine with the first"]
    text = f"Cosines of the two views of an image, on average {own.mean():.2f}"
    if count > 1:
        rows.append(match.second[hardest.to(match.second.device)])
        wrong = (found >= own).tolist()
        notes.append([Line(f"{c:.2f}", WRONG if w else PLAIN) for c, w in zip(found.tolist(), wrong, strict=True)])
        titles.append("the most alike view of another image")
        mean = others[others > -torch.inf].mean()
        text += f"; of views of different images {mean:.2f}, of the most alike of them {found.mean():.2f}"
    return beneath(titles, rows, notes), text
