"""Very many keys, in 16 bytes each: is one among them, does one occur twice?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_DIGEST = 16
"""Bytes of sha256 that stand for a key: among 10^12 keys, two share them with a chance of 10^-15."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:_DIGEST]


class Keys:
    """The keys of shards. Sorting them takes another 16 bytes each."""

    def __init__(self) -> None:
        self._shards: list[np.ndarray] = []
        self._sorted = np.empty(0, f"S{_DIGEST}")

    def add(self, keys: Sequence[str]) -> None:
        """Add those of one shard."""
        self._shards.append(np.asarray([_digest(key) for key in keys], f"S{_DIGEST}"))

    def sort(self) -> None:
        """Make ready for looking up, once all were added."""
        self._sorted = np.concatenate([self._sorted, *self._shards])
        self._sorted.sort()

    def __contains__(self, key: str) -> bool:
        if not len(self._sorted):
            return False
        wanted = np.asarray([_digest(key)], self._sorted.dtype)
        place = int(np.searchsorted(self._sorted, wanted)[0])
        return bool((self._sorted[place : place + 1] == wanted).any())

    def repeated(self, read: Callable[[int], Sequence[str]]) -> Iterator[tuple[str, int, int]]:
        """Each key that an earlier shard holds too, or the same one: the key, the earlier shard's number, its own.

        Args:
            read: Gives a shard's keys again, by its number; asked for those shards only that hold such keys.
        """
        self.sort()
        twice = np.unique(self._sorted[1:][self._sorted[1:] == self._sorted[:-1]])
        first: dict[str, int] = {}
        for number, digests in enumerate(self._shards):
            rows = np.flatnonzero(np.isin(digests, twice)).tolist()
            keys = read(number) if rows else ()
            for row in rows:
                if keys[row] in first:
                    yield keys[row], first[keys[row]], number
                first.setdefault(keys[row], number)
