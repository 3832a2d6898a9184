"""Statistics of a data set, as sums that can be added up shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MEASURES = ("width", "height", "image_bytes", "caption_length")


class Facts(NamedTuple):
    """What one stored sample adds."""

    width: int | None
    height: int | None
    """None where the image was not decoded."""
    image_bytes: int | None
    caption_length: int | None
    """Characters; None without a caption."""
    label: int | None
    sums: tuple[int, ...] = (0,) * 6
    """Sum of each channel R, G, B, then sum of squares of each, over all pixels (0 to 255)."""


def channel_sums(image: Image.Image) -> tuple[int, ...]:
    """Sums and sums of squares of R, G and B; exact, so that their order never matters."""
    counts = np.asarray(image.histogram(), np.int64).reshape(-1, 256)
    value = np.arange(256)
    sums, squares = counts @ value, counts @ value**2
    each = 3 // len(sums)
    return (*(int(s) for s in sums.repeat(each)), *(int(s) for s in squares.repeat(each)))


class Statistics:
    """Sums over samples."""

    def __init__(self) -> None:
        self.samples = 0
        self.measures: dict[str, dict[str, Any]] = {}
        self.labels: Counter[int] = Counter()
        self.pixels = 0
        self.sums = [0] * 6

    def add(self, facts: Facts) -> None:
        """Count one sample."""
        self.samples += 1
        for name, value in zip(MEASURES, facts[:4], strict=True):
            if value is not None:
                self._measure(name, value)
        if facts.label is not None:
            self.labels[facts.label] += 1
        if facts.width is not None and facts.height is not None:
            self.pixels += facts.width * facts.height
            self.sums = [a + b for a, b in zip(self.sums, facts.sums, strict=True)]

    def _measure(self, name: str, value: int) -> None:
        m = self.measures.get(name)
        if m is None:
            m = self.measures[name] = {"count": 0, "sum": 0, "min": value, "max": value, "below": {}}
        m["count"] += 1
        m["sum"] += value
        m["min"], m["max"] = min(m["min"], value), max(m["max"], value)
        power = str(2 ** value.bit_length())
        m["below"][power] = m["below"].get(power, 0) + 1

    def measure(self, name: str, values: np.ndarray) -> None:
        """Count one measure of many samples.

        Args:
            name: One of ``MEASURES``.
            values: int64[N], from 0 to 2^53.
        """
        if not len(values):
            return
        powers, counts = np.unique(np.frexp(values.astype(np.float64))[1], return_counts=True)
        below = {str(2 ** int(p)): int(n) for p, n in zip(powers, counts, strict=True)}
        facts = {"count": len(values), "sum": int(values.sum()), "min": int(values.min()), "max": int(values.max())}
        self._join(name, {**facts, "below": below})

    def renumber(self, numbers: Sequence[int]) -> None:
        """Count labels under other numbers.

        Args:
            numbers: The new number of each class; empty: they stay.
        """
        if numbers:
            self.labels = Counter({numbers[label]: count for label, count in self.labels.items()})

    def merge(self, other: Statistics) -> None:
        """Add another set of sums."""
        self.samples += other.samples
        self.labels.update(other.labels)
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        for name, theirs in other.measures.items():
            self._join(name, theirs)

    def _join(self, name: str, theirs: Mapping[str, Any]) -> None:
        mine = self.measures.get(name)
        if mine is None:
            self.measures[name] = {**theirs, "below": dict(theirs["below"])}
            return
        for key, join in (("count", int.__add__), ("sum", int.__add__), ("min", min), ("max", max)):
            mine[key] = join(mine[key], theirs[key])
        mine["below"] = dict(Counter(mine["below"]) + Counter(theirs["below"]))

    def as_json(self) -> dict[str, Any]:
        """Plain values for the manifest: sums, and the mean and standard deviation they give (0 to 1)."""
        for m in self.measures.values():
            m["below"] = dict(sorted(m["below"].items(), key=lambda item: int(item[0])))
        body: dict[str, Any] = {
            "samples": self.samples,
            "measures": self.measures,
            "labels": {str(k): self.labels[k] for k in sorted(self.labels)},
            "pixels": self.pixels,
            "sums": self.sums,
        }
        if self.pixels:
            mean = np.asarray([s / self.pixels for s in self.sums[:3]])  # by Python: they may outgrow 64 bits
            square = np.asarray([s / self.pixels for s in self.sums[3:]])
            body["mean"] = [round(float(m) / 255, 6) for m in mean]
            body["std"] = [round(float(s) / 255, 6) for s in np.sqrt(np.maximum(square - mean**2, 0))]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Statistics:
        """Read back what :meth:`as_json` wrote."""
        self = cls()
        self.samples, self.pixels, self.sums = body["samples"], body["pixels"], list(body["sums"])
        self.measures = {k: {**m, "below": dict(m["below"])} for k, m in body["measures"].items()}
        self.labels = Counter({int(k): v for k, v in body["labels"].items()})
        return self
