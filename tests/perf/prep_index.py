"""Indexing existing tars (every header checked, CRC-32 of every member, sha256) against reading the files.

Both from the page cache, where sha256 alone is several times slower than reading, and from the disk. All cores hash, so
it is the wall clock that counts. Run: ``python -m tests.perf.prep_index [--trials 7]``.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.index import index
from data_prep.scan import scan
from tests.perf.prep_write import _theirs
from tests.perf.stream_corpus import compare, trials


def _read(paths: list[Path], use: Callable[[memoryview], object] = lambda piece: None) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while n := f.readinto(buffer):
                use(buffer[:n])


def _forget(paths: list[Path]) -> None:
    """Drop what the page cache holds of these files."""
    for path in paths:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    wanted = trials(__doc__)
    rng = np.random.default_rng(0)
    for size, count in ((130_000, 8000), (2_000, 40_000)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "x"
            _theirs(folder, [rng.bytes(size) for _ in range(100)] * (count // 100))
            paths = sorted(folder.glob("*.tar"))
            title = f"{count} samples of {size // 1000} kB in {len(paths)} tars"
            ways = {
                "reading *": lambda p=paths: _read(p),
                "reading and sha256, one thread *": lambda p=paths: _read(p, hashlib.sha256().update),
                "all but writing, one thread *": lambda p=paths: [scan(path) for path in p],
                "index *": lambda f=folder: index(str(f)),
            }
            compare(f"Indexing {title}, from the page cache", "samples", count, ways, wanted)
            cold = {
                "reading *": lambda p=paths: _read(p),
                "index *": lambda f=folder: index(str(f)),
            }
            compare(
                f"Indexing {title}, from the disk", "samples", count, cold, wanted, before=lambda p=paths: _forget(p)
            )


if __name__ == "__main__":
    main()
