"""scikit-learn's handwritten digits: 1,797 greyscale images of 8 x 8, enlarged. Real, tiny, and always at hand.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_prep.record import Inline, Record
from pipeline.core.errors import ConfigError

SAMPLES = 1797
LEVELS = 16
"""Each pixel is a count of 0 to 16: the ink in a block of 4 x 4 of a bitmap of 32 x 32."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class DigitsSource:
    """The digits, as PNG."""

    size: int = 32
    """Pixels of the side."""
    limit: int = SAMPLES
    """First so many of them."""
    held_out: int = 0
    """So many of them make the split "val" and all others "train": those whose keys have the least hash. 0: as the
    build's splits say."""

    classes: tuple[str, ...] = field(default=WORDS, init=False)

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.total = min(self.limit, SAMPLES)
        if self.size < 8 or self.limit < 1:
            raise ConfigError(f"digits have at least 8 pixels and 1 sample, not {self.size} and {self.limit}")
        if not 0 <= self.held_out < self.total:
            raise ConfigError(
                f"digits: held_out leaves samples in train, so it is 0 to {self.total - 1}, not {self.held_out}"
            )

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        held_out = {"held_out": self.held_out} if self.held_out else {}
        return {"kind": "digits", "size": self.size, "limit": self.limit} | held_out

    def __iter__(self) -> Iterator[Record]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        keys = [f"{i:04d}" for i in range(self.total)]
        held_out = set(sorted(keys, key=draw_of)[: self.held_out])
        for key, counts, label in zip(keys, digits.images, digits.target, strict=False):
            yield Record(
                key=key,
                identity=key,
                image=Inline(enlarged(counts, self.size)),
                stamp=hashlib.sha256(np.round(counts * (255 / LEVELS)).astype(np.uint8).tobytes()).hexdigest(),
                label=int(label),
                caption=f"a handwritten digit {WORDS[label]}",
                metadata={"digit": int(label), "draw": draw_of(key)},
                split=("val" if key in held_out else "train") if self.held_out else None,
            )


def enlarged(counts: np.ndarray, size: int) -> bytes:
    """Counts of 0 to 16, [8,8], as a PNG of ``size`` pixels a side."""
    pixels = np.round(counts * (255 / LEVELS)).astype(np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(target, "PNG")
    return target.getvalue()


def draw_of(key: str) -> float:
    """A number in [0, 1) that belongs to a key, for parts of a data set: ``where = 'digit < 5 or draw < 0.2'``."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48
