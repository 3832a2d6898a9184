"""scikit-learn's handwritten digits: 1,797 greyscale images of 8 x 8, enlarged. Real, tiny, and always at hand.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.record import Inline, Record
from pipeline.core.errors import ConfigError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class DigitsSource:
    """The digits, as PNG."""

    size: int = 32
    """Pixels of the side."""
    limit: int = 1797
    """First so many of them."""

    classes: tuple[str, ...] = field(default=WORDS, init=False)

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.total = min(self.limit, 1797)
        if self.size < 8 or self.limit < 1:
            raise ConfigError(f"digits have at least 8 pixels and 1 sample, not {self.size} and {self.limit}")

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        return {"kind": "digits", "size": self.size, "limit": self.limit}

    def __iter__(self) -> Iterator[Record]:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        for i, (image, label) in enumerate(zip(pixels[: self.limit], digits.target, strict=False)):
            target = io.BytesIO()
            Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC).save(target, "PNG")
            yield Record(
                key=f"{i:04d}",
                identity=f"{i:04d}",
                image=Inline(target.getvalue()),
                stamp=hashlib.sha256(image.tobytes()).hexdigest(),
                label=int(label),
                caption=f"a handwritten digit {WORDS[label]}",
            )
