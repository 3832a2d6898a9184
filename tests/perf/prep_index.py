"""Indexing existing tars (every header checked, CRC-32 of every member, sha256) against reading the files.

From the disk, where files lie that are looked through for the first time, and from the page cache, where sha256 alone
takes several times as long as reading. All cores hash, so it is the wall clock that counts. 3 GB each: starting the
processes takes 0.2 s.
Run: ``python -m tests.perf.prep_index [--trials 7]``.
"""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.index import index
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


def _forget_index(folder: Path) -> None:
    """As before the first time: to put a file in another's place the disk is waited for."""
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()


def _hashed(path: Path) -> None:
    _read([path], hashlib.sha256().update)


def main() -> None:
    from tests.perf.prep_write import _theirs  # brings webdataset and torch, which worker processes need not import

    wanted = trials(__doc__)
    rng = np.random.default_rng(0)
    pool = ProcessPoolExecutor(mp_context=mp.get_context("forkserver"))
    for size, count in ((130_000, 24_000), (2_000, 400_000)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "x"
            _theirs(folder, [rng.bytes(size) for _ in range(100)] * (count // 100))
            paths = sorted(folder.glob("*.tar"))
            title = f"{count} samples of {size // 1000} kB in {len(paths)} tars"
            ways = {
                "reading, one thread *": lambda p=paths: _read(p),
                "reading and sha256, all cores *": lambda p=paths: list(pool.map(_hashed, p)),
                "index *": lambda f=folder: index(str(f)),
            }

            def prepare(before: Callable[[list[Path]], None], folder: Path = folder, paths: list[Path] = paths) -> None:
                _forget_index(folder)
                before(paths)

            for place, before in {"disk": _forget, "page cache": _read}.items():
                compare(f"{title}, from the {place}", "samples", count, ways, wanted, lambda b=before: prepare(b))
    pool.shutdown()


if __name__ == "__main__":
    main()
