"""Scenes: several glyphs on a ground, and which pixel belongs to which. Rendered here; nothing is fetched.

The mask is exact: a pixel is of the character whose ink covers half of it or more, the one on top where several do,
and else of the background, class 0. Typefaces of "val" are those that "train" has never shown.
"""

from __future__ import annotations

import io
import math
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_prep.record import Inline, Record
from data_prep.sources.glyphs import FINE, TYPEFACES, alphabet, brightness, has, ink
from pipeline.core.errors import ConfigError

BACKGROUND = "background"
SCALES = (0.45, 0.75)
"""Least and most side of a character's box, as a part of the scene's."""
TURN = 20
"""Most degrees."""
CONTRAST = 70
"""Least difference in brightness between a character and the middle of the ground."""


@dataclass
class ScenesSource:
    """Images of several characters, each with its mask."""

    characters: int = 20
    train: int = 2000
    """Scenes."""
    val: int = 400
    most: int = 5
    """Characters in a scene: 1 to so many."""
    size: int = 64
    """Pixels of the side."""
    seed: int = 0

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if min(self.train, self.most) < 1 or self.val < 0 or not 16 <= self.size <= 512:
            raise ConfigError(
                "scenes: there is at least 1 scene in train and 1 character in a scene, and size is 16 to 512; got "
                f"{self.train}, {self.most} and {self.size}"
            )
        known = alphabet(min(self.characters, 255))
        if not 1 <= self.characters <= len(known):
            raise ConfigError(
                f"scenes: there are 1 to {len(known)} characters to be had (a mask has 255), not {self.characters}"
            )
        self._characters = known
        self.classes = (BACKGROUND, *(unicodedata.name(c) for c in known))
        self.total = self.train + self.val

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        import matplotlib
        import PIL

        settings = {n: getattr(self, n) for n in ("characters", "train", "val", "most", "size", "seed")}
        versions = {"fonts": f"matplotlib {matplotlib.__version__}", "renderer": f"Pillow {PIL.__version__}"}
        return {"kind": "scenes", **settings, **versions}

    def __iter__(self) -> Iterator[Record]:
        for split, count in (("train", self.train), ("val", self.val)):
            for number in range(count):
                key = f"{split}-{number:06d}"
                image, mask, shown = self._scene(random.Random(f"{self.seed} {key}"), held_out=split == "val")
                names = ", ".join(unicodedata.name(c) for c in shown)
                yield Record(
                    key=key,
                    identity=key,
                    image=Inline(_png(Image.fromarray(image))),
                    caption=f"a scene of {names}",
                    more={"mask.png": _png(Image.fromarray(mask))},
                    split=split,
                )

    def _scene(self, r: random.Random, held_out: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """uint8[S,S,3], its mask uint8[S,S], and the characters from the lowest to the topmost."""
        image, mask = _ground(r, self.size), np.zeros((self.size, self.size), np.uint8)
        middle, shown = brightness(*image.mean(axis=(0, 1))), []
        for _ in range(r.randint(1, self.most)):
            number = r.randrange(self.characters)
            c = self._characters[number]
            faces = [i for i, face in enumerate(TYPEFACES) if face.held_out == held_out and has(face, c)]
            cover = np.asarray(self._placed(r, r.choice(faces), c), np.float32)[..., None] / 255
            image = image * (1 - cover) + np.asarray(_ink(r, middle), np.float32) * cover
            mask[cover[..., 0] >= 0.5] = number + 1
            shown.append(c)
        return np.round(image).astype(np.uint8), mask, shown

    def _placed(self, r: random.Random, face: int, character: str) -> Image.Image:
        """L[S,S]: how much of each pixel is covered by a character that is scaled, turned and moved."""
        side = self.size * FINE
        scale, angle = r.uniform(*SCALES), math.radians(r.uniform(-TURN, TURN))
        x, y = (r.uniform(0.2, 0.8) * side for _ in range(2))
        c, s, centre = math.cos(angle) / scale, math.sin(angle) / scale, side / 2
        matrix = (c, s, centre - c * x - s * y, -s, c, centre + s * x - c * y)
        drawn = ink(face, character, side, r.choice((0, 1)))
        return drawn.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(FINE)


def _ground(r: random.Random, size: int) -> np.ndarray:
    """A slow change between two colours in some direction, with grain: float32[S,S,3]."""
    one, two = ([r.randrange(256) for _ in range(3)] for _ in range(2))
    angle, place = r.uniform(0, 2 * math.pi), np.arange(size) / size - 0.5
    part = 0.5 + (math.cos(angle) * place + math.sin(angle) * place[:, None]) / 1.5
    grain = np.random.default_rng(r.getrandbits(32)).normal(0, 6, (size, size, 1))
    ground = np.asarray(one) * (1 - part[..., None]) + np.asarray(two) * part[..., None] + grain
    return ground.clip(0, 255).astype(np.float32)


def _ink(r: random.Random, middle: float) -> list[int]:
    """A colour that differs from the middle of the ground in brightness."""
    while True:
        colour = [r.randrange(256) for _ in range(3)]
        if abs(brightness(*colour) - middle) > CONTRAST:
            return colour


def _png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=3)
    return target.getvalue()
