"""Digits set in type: the classes of scikit-learn's handwritten digits in another domain, made into pixels alike.

A digit in one of matplotlib's typefaces is turned and slanted a little, cut out, scaled to a bitmap of 32 x 32 and
counted in blocks of 4 x 4, which is how Alpaydin and Kaynak (1998) made theirs. So the two domains differ in how digits
are drawn, and not in size, place or resolution. Nothing is fetched.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_prep.record import Inline, Record
from data_prep.sources.digits import WORDS, draw_of, enlarged
from data_prep.sources.glyphs import TYPEFACES, ink
from pipeline.core.errors import ConfigError

DRAWN = 128
"""Pixels of the side at which a digit is drawn."""
BITMAP, BLOCK = 32, 4
TURN, SLANT = 12, 0.2
"""Most degrees, and most of a shear."""
FAMILIES = {
    "dejavu_sans": ("DejaVuSans",),
    "dejavu_mono": ("DejaVuSansMono",),
    "dejavu_serif": ("DejaVuSerif",),
    "stix": ("STIXGeneral",),
    "computer_modern": ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
}
"""Domains: family and how the files of its typefaces begin; the longest that fits counts."""


def family_of(file: str) -> str:
    """The family of a typeface."""
    fitting = [(len(start), name) for name, starts in FAMILIES.items() for start in starts if file.startswith(start)]
    return max(fitting)[1]


@dataclass
class TypefacesSource:
    """Digits in all typefaces. Metadata: "family", "face" (its file), "digit", "draw" (a number in [0, 1), by key)."""

    digits: int = 10
    """Classes: the digits from zero on."""
    samples: int = 15
    """Images per digit and typeface."""
    size: int = 32
    """Pixels of the side."""
    seed: int = 0

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= len(WORDS) or self.samples < 1 or self.size < 8:
            raise ConfigError(
                "typefaces: digits are 1 to 10, samples at least 1, pixels at least 8; got "
                f"{self.digits}, {self.samples} and {self.size}"
            )
        self.classes = WORDS[: self.digits]
        self.total = self.digits * self.samples * len(TYPEFACES)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        import matplotlib
        import PIL

        settings = {name: getattr(self, name) for name in ("digits", "samples", "size", "seed")}
        versions = {"fonts": f"matplotlib {matplotlib.__version__}", "renderer": f"Pillow {PIL.__version__}"}
        return {"kind": "typefaces", **settings, **versions}

    def __iter__(self) -> Iterator[Record]:
        places = [(d, f, i) for d in range(self.digits) for f in range(len(TYPEFACES)) for i in range(self.samples)]
        random.Random(self.seed).shuffle(places)
        for digit, face, number in places:
            key = f"{digit}-{face:02d}-{number:04d}"
            family = family_of(TYPEFACES[face].file)
            yield Record(
                key=key,
                identity=key,
                image=Inline(enlarged(counts_of(digit, face, random.Random(f"{self.seed} {key}")), self.size)),
                label=digit,
                caption=f"a digit {WORDS[digit]} in {family.replace('_', ' ')}",
                metadata={"family": family, "face": TYPEFACES[face].file, "digit": digit, "draw": draw_of(key)},
            )


def counts_of(digit: int, face: int, r: random.Random) -> np.ndarray:
    """A digit as the handwritten ones are kept: float64[8,8], counts of 0 to 16."""
    glyph = ink(face, str(digit), DRAWN, r.choice((0, 0, 2)))
    angle, slant, middle = math.radians(r.uniform(-TURN, TURN)), r.uniform(-SLANT, SLANT), DRAWN / 2
    a, b = math.cos(angle), math.sin(angle) + slant * math.cos(angle)
    c, d = -math.sin(angle), math.cos(angle) - slant * math.sin(angle)
    matrix = (a, b, middle * (1 - a - b), c, d, middle * (1 - c - d))
    turned = glyph.transform((DRAWN, DRAWN), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    inked = Image.fromarray((np.asarray(turned) >= 128).astype(np.uint8) * 255)
    box = inked.getbbox()
    assert box is not None, "a digit has ink"
    width, height = box[2] - box[0], box[3] - box[1]
    scale = BITMAP / max(width, height)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    bitmap = Image.new("L", (BITMAP, BITMAP))
    bitmap.paste(
        inked.crop(box).resize(shape, Image.Resampling.BOX), ((BITMAP - shape[0]) // 2, (BITMAP - shape[1]) // 2)
    )
    blocks = (np.asarray(bitmap) >= 128).reshape(BITMAP // BLOCK, BLOCK, BITMAP // BLOCK, BLOCK)
    return blocks.sum(axis=(1, 3)).astype(np.float64)
