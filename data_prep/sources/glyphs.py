"""Glyphs: the embedded default data. Unicode characters in the typefaces that matplotlib bundles; nothing is fetched.

Each image is one character, turned, scaled, moved, its stroke thickened, in some ink on some paper. Its label is the
character, its caption comes from the Unicode name ("a bold italic serif LATIN CAPITAL LETTER A"). The split "val" holds
typefaces that "train" has never shown.
"""

from __future__ import annotations

import io
import math
import os
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.record import Record
from pipeline.core.errors import ConfigError


class Typeface(NamedTuple):
    """One of matplotlib's fonts."""

    file: str
    style: str
    """As captions call it."""
    held_out: bool = False
    """Only in "val"."""
    letters_only: bool = False
    """TeX fonts hold other signs where Unicode has its punctuation."""


TYPEFACES = (
    Typeface("DejaVuSans", "sans-serif"),
    Typeface("DejaVuSans-Bold", "bold sans-serif"),
    Typeface("DejaVuSans-Oblique", "italic sans-serif"),
    Typeface("DejaVuSans-BoldOblique", "bold italic sans-serif"),
    Typeface("DejaVuSansMono", "monospaced"),
    Typeface("DejaVuSansMono-Bold", "bold monospaced"),
    Typeface("DejaVuSansMono-Oblique", "italic monospaced", held_out=True),
    Typeface("DejaVuSansMono-BoldOblique", "bold italic monospaced"),
    Typeface("DejaVuSerif", "serif"),
    Typeface("DejaVuSerif-Bold", "bold serif", held_out=True),
    Typeface("DejaVuSerif-Italic", "italic serif"),
    Typeface("DejaVuSerif-BoldItalic", "bold italic serif"),
    Typeface("STIXGeneral", "book serif", held_out=True),
    Typeface("STIXGeneralBol", "bold book serif"),
    Typeface("STIXGeneralItalic", "italic book serif"),
    Typeface("STIXGeneralBolIta", "bold italic book serif"),
    Typeface("cmr10", "roman", letters_only=True),
    Typeface("cmb10", "bold roman", letters_only=True),
    Typeface("cmss10", "grotesque", held_out=True, letters_only=True),
    Typeface("cmti10", "italic roman", letters_only=True),
    Typeface("cmtt10", "typewriter", letters_only=True),
)
BLOCKS = (
    (0x41, 0x5A),  # Latin capitals
    (0x61, 0x7A),
    (0x30, 0x39),
    (0x391, 0x3C9),  # Greek
    (0x410, 0x44F),  # Cyrillic
    (0x21, 0x2F),
    (0x3A, 0x40),
    (0x5B, 0x60),
    (0x7B, 0x7E),
    (0xA1, 0xFF),  # Latin-1
    (0x2190, 0x21FF),  # arrows
    (0x2200, 0x22FF),  # mathematical operators
    (0x2500, 0x25FF),  # box drawing, geometric shapes
    (0x100, 0x17F),  # Latin with more accents
    (0x370, 0x38F),
    (0x400, 0x40F),
    (0x450, 0x481),
    (0x531, 0x587),  # Armenian
    (0x10A0, 0x10FF),  # Georgian
    (0x2600, 0x26FF),
    (0x2700, 0x27BF),
)
"""Where characters are taken from, in this order."""
LEAST_FACES = 8
"""A character must exist in so many typefaces, held-out ones among them."""
ALIKE = 0.8
"""Overlap (intersection over union of ink in a common box) above which two characters are the same to the eye."""
LEAST_INK = 0.3
"""Least width or height of a character, as a part of the letter height: no dots and commas."""
_JUDGES = (0, 8)
"""Typefaces that these are measured in: a sans and a serif that draw all BLOCKS."""
_BOX = 24
FINE = 2
"""Drawn at so many times the size, then averaged: smooth edges."""


@dataclass
class GlyphsSource:
    """Images of characters."""

    characters: int = 200
    samples: int = 10
    """Images per character and typeface."""
    size: int = 32
    """Pixels of the side."""
    seed: int = 0
    variation: float = 1.0
    """How much turn, scale, place and colours vary, 0 to 1; 0 is upright black on white."""

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.samples < 1 or not 16 <= self.size <= 512:
            raise ConfigError(f"glyphs: samples is at least 1, size 16 to 512; got {self.samples} and {self.size}")
        if not 0 <= self.variation <= 1:
            raise ConfigError(f"glyphs: variation is 0 to 1, not {self.variation}")
        known = alphabet(self.characters)
        if len(known) < self.characters or self.characters < 1:
            raise ConfigError(f"glyphs: there are 1 to {len(known)} characters to be had, not {self.characters}")
        self._characters = known
        self.classes = tuple(unicodedata.name(c) for c in known)
        self.total = self.samples * sum(has(typeface, c) for typeface in TYPEFACES for c in known)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        import matplotlib
        import PIL

        return {
            "kind": "glyphs",
            "characters": self.characters,
            "samples": self.samples,
            "size": self.size,
            "seed": self.seed,
            "variation": self.variation,
            "fonts": f"matplotlib {matplotlib.__version__}",
            "renderer": f"Pillow {PIL.__version__}",
        }

    def __iter__(self) -> Iterator[Record]:
        todo = [
            (label, face, i)
            for label, c in enumerate(self._characters)
            for face, typeface in enumerate(TYPEFACES)
            if has(typeface, c)
            for i in range(self.samples)
        ]
        random.Random(self.seed).shuffle(todo)
        for label, face, i in todo:
            typeface, c = TYPEFACES[face], self._characters[label]
            name = unicodedata.name(c)
            article = "an" if typeface.style[0] in "aeiou" else "a"
            key = f"{ord(c):05x}-{face:02d}-{i:04d}"
            yield Record(
                key=key,
                identity=key,
                image=Drawing(face, c, self.size, self.variation, f"{self.seed} {key}"),
                stamp="",
                label=label,
                caption=f"{article} {typeface.style} {name}",
                split="val" if typeface.held_out else "train",
            )


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image that is drawn when it is read."""

    face: int
    character: str
    size: int
    variation: float
    seed: str

    def read(self) -> bytes:
        """The image as PNG."""
        r = random.Random(self.seed)
        side = self.size * FINE
        glyph = ink(self.face, self.character, side, r.choice((0, 0, 1)))
        v = self.variation
        angle, scale = math.radians(r.uniform(-20, 20) * v), 1 + r.uniform(-0.25, 0.15) * v
        dx, dy = r.uniform(-0.1, 0.1) * v * side, r.uniform(-0.1, 0.1) * v * side
        c, s, centre = math.cos(angle) / scale, math.sin(angle) / scale, side / 2
        x, y = centre + dx, centre + dy
        matrix = (c, s, centre - c * x - s * y, -s, c, centre + s * x - c * y)
        mask = glyph.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(FINE)
        colour, paper = _colours(r, v)
        target = io.BytesIO()
        Image.composite(Image.new("RGB", mask.size, colour), Image.new("RGB", mask.size, paper), mask).save(
            target, "PNG", compress_level=3
        )
        return target.getvalue()


def _colours(r: random.Random, variation: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ink and paper that differ clearly in brightness: random ones, mixed with black ink and white paper."""
    while True:
        bits = r.getrandbits(48).to_bytes(6, "big")
        colour = tuple(round(variation * x) for x in bits[:3])
        paper = tuple(round(255 - variation * (255 - x)) for x in bits[3:])
        if abs(brightness(*colour) - brightness(*paper)) > 80:
            return colour, paper


def brightness(red: float, green: float, blue: float) -> float:
    """Luma of Rec. 601, 0 to 255."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


@cache
def _path(face: int) -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{TYPEFACES[face].file}.ttf")


@cache
def _covered(face: int) -> frozenset[int]:
    """Code points that the font draws, without its sign for what is missing."""
    from matplotlib.ft2font import FT2Font

    return frozenset(code for code, glyph in FT2Font(_path(face)).get_charmap().items() if glyph != 0)


def has(typeface: Typeface, character: str) -> bool:
    """Whether the typeface draws this character."""
    plain = character.isascii() and character.isalnum()
    return ord(character) in _covered(TYPEFACES.index(typeface)) and (plain or not typeface.letters_only)


@cache
def _font(face: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_path(face), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def ink(face: int, character: str, side: int, stroke: int) -> Image.Image:
    """L[side,side]: the character's ink in the middle, a capital letter about 60 % of the side high."""
    font = _font(face, round(side * 0.8))
    image = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    place = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, character, 255, font, stroke_width=stroke)
    return image


def _shape(character: str) -> np.ndarray:
    """float32[judges, _BOX * _BOX], 1 where there is ink, fitted into a box with its proportions kept.

    Zeros for too little ink.
    """
    shapes = np.zeros((len(_JUDGES), _BOX, _BOX), np.float32)
    for face, shape in zip(_JUDGES, shapes, strict=True):
        image = Image.new("L", (192, 192))
        ImageDraw.Draw(image).text((48, 30), character, 255, _font(face, 96))
        box = image.getbbox()
        if box is None or max(box[2] - box[0], box[3] - box[1]) < LEAST_INK * 96:
            break
        scale = _BOX / max(box[2] - box[0], box[3] - box[1])
        w, h = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
        ink = np.asarray(image.resize((w, h), Image.Resampling.BOX, box)) > 127
        top, left = (_BOX - h) // 2, (_BOX - w) // 2
        shape[top : top + h, left : left + w] = ink
    return shapes.reshape(len(_JUDGES), -1)


@lru_cache(maxsize=8)
def alphabet(count: int) -> tuple[str, ...]:
    """The first ``count`` characters (or all there are) that most typefaces draw and that the eye can tell apart."""
    chosen: list[str] = []
    codes = [code for first, last in BLOCKS for code in range(first, last + 1)]
    shapes = np.zeros((len(_JUDGES), len(codes), _BOX * _BOX), np.float32)
    for code in codes:
        c = chr(code)
        faces = [t for t in TYPEFACES if has(t, c)]
        judged = all(TYPEFACES[j] in faces for j in _JUDGES)
        if len(faces) < LEAST_FACES or not any(t.held_out for t in faces) or not judged or not unicodedata.name(c, ""):
            continue
        shape = _shape(c)
        n = len(chosen)
        common = np.einsum("jns,js->jn", shapes[:, :n], shape)
        union = shapes[:, :n].sum(-1) + shape.sum(-1, keepdims=True) - common
        if not shape.any(-1).all() or (common > ALIKE * union).any():
            continue
        shapes[:, n] = shape
        chosen.append(c)
        if len(chosen) == count:
            break
    return tuple(chosen)
