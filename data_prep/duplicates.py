"""Finding samples like an earlier one: by equal bytes, equal pixels, or perceptual hashes that differ in few bits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.options import Duplicates

FOLDER = "prints"
"""Of the digests of all samples, a file per shard: what is added later is compared with them."""
_SIDE, _LOW = 32, 8
_WIDTHS = {"bytes": 16, "pixels": 16, "looks": 8}
"""Kinds of digests and their bytes."""


class Print(NamedTuple):
    """What a sample is known again by."""

    place: int
    """In the input."""
    key: str
    digests: tuple[bytes, ...]
    """Of the bytes, of the pixels, and, if that was asked for, the perceptual hash."""


def prints_name(shard: str) -> str:
    """Name of the file with a shard's digests: ``train-000000.tar`` has ``prints/train-000000.npz``."""
    return f"{FOLDER}/{shard.removesuffix('.tar')}.npz"


def pack(prints: Sequence[Print]) -> bytes:
    """The content of that file: the same digests give the same bytes."""
    arrays = {
        kind: np.frombuffer(b"".join(digests), np.uint8).reshape(len(prints), -1)
        for kind, digests in zip(_WIDTHS, zip(*(p.digests for p in prints), strict=True), strict=False)
    }
    keys = np.frombuffer("\0".join(p.key for p in prints).encode(), np.uint8)
    target = io.BytesIO()
    np.savez(target, allow_pickle=False, places=np.asarray([p.place for p in prints]), keys=keys, **arrays)
    return target.getvalue()


def unpack(data: bytes) -> list[Print]:
    """Read back what :func:`pack` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as body:
        columns = [[row.tobytes() for row in body[kind]] for kind in _WIDTHS if kind in body]
        keys = body["keys"].tobytes().decode().split("\0")
        return [Print(*row) for row in zip(body["places"].tolist(), keys, zip(*columns, strict=True), strict=True)]


@cache
def _cosines() -> np.ndarray:
    """float64[8,32], the lowest rows of the DCT-II."""
    k, n = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))


def perceptual_hash(image: Image.Image) -> bytes:
    """64 bits that change little when an image is rescaled or recompressed.

    The signs of its 8 x 8 lowest DCT coefficients at 32 x 32 pixels against their median (the pHash of Zauner,
    "Implementation and benchmarking of perceptual image hash functions", 2010).
    """
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    low = _cosines() @ np.asarray(small, np.float64) @ _cosines().T
    return np.packbits(low > np.median(low)).tobytes()


class Seen:
    """What was kept so far, by its place in the input. About 300 bytes per sample, and about 200 more per band.

    By the pigeonhole principle two hashes of 64 bits that differ in at most d bits agree in one of d + 1 bands, so
    only samples that share a band are compared. Answers depend on earlier samples only, whatever was added: so a
    resumed build, which knows some later ones already, finds what the undisturbed one found.
    """

    def __init__(self, options: Duplicates) -> None:
        self._exact: dict[bytes, tuple[int, str]] = {}
        self._bands: list[dict[int, list[tuple[int, int, str]]]] = [{} for _ in range(options.distance + 1)]
        self._distance = options.distance

    def like(self, prints: Sequence[bytes], place: int) -> str | None:
        """Why the sample at ``place`` is a duplicate, naming the earlier one; None if it is not."""
        for kind, digest in zip(("bytes", "pixels"), prints, strict=False):
            earlier = self._exact.get(digest)
            if earlier is not None and earlier[0] < place:
                return f"duplicate ({kind}) of {earlier[1]}"
        if self._distance < 0:
            return None
        value = int.from_bytes(prints[2], "big")
        found = [
            (bits, other, name)
            for table, band in zip(self._bands, self._split(value), strict=True)
            for other, theirs, name in table.get(band, ())
            if other < place and (bits := (value ^ theirs).bit_count()) <= self._distance
        ]
        if not found:
            return None
        bits, _, name = min(found)
        return f"duplicate (looks alike, {bits} of 64 bits differ) of {name}"

    def add(self, prints: Sequence[bytes], place: int, name: str) -> None:
        """Remember a kept sample."""
        for digest in prints[:2]:
            self._exact[digest] = min(self._exact.get(digest, (place, name)), (place, name))
        if self._distance >= 0:
            value = int.from_bytes(prints[2], "big")
            for table, band in zip(self._bands, self._split(value), strict=True):
                table.setdefault(band, []).append((place, value, name))

    def _split(self, value: int) -> list[int]:
        """The bits of ``value`` cut into as many bands as there are tables."""
        n = len(self._bands)
        edges = [64 * i // n for i in range(n + 1)]
        return [(value >> a) & ((1 << (b - a)) - 1) for a, b in pairwise(edges)]
