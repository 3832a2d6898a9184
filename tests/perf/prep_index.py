"""Indexing existing tars (walking, checking, sha256) against reading the files, from the page cache.

Run: ``python -m tests.perf.prep_index [--trials 7]``. Wall clock, since hashing uses all cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from data_prep.index import index
from data_prep.scan import scan
from tests.perf.prep_write import _theirs
from tests.perf.stream_corpus import compare, trials


def _read(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while f.read(1 << 20):
                pass


def main() -> None:
    wanted = trials(__doc__)
    rng = np.random.default_rng(0)
    for size, count in ((130_000, 4000), (2_000, 40_000)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "x"
            _theirs(folder, [rng.bytes(size) for _ in range(100)] * (count // 100))
            paths = sorted(folder.glob("*.tar"))
            compare(
                f"Indexing {count} samples of {size // 1000} kB in {len(paths)} tars",
                "samples",
                count,
                {
                    "reading *": lambda p=paths: _read(p),
                    "walking and hashing, one thread *": lambda p=paths: [scan(path) for path in p],
                    "index *": lambda f=folder: index(str(f)),
                },
                wanted,
            )


if __name__ == "__main__":
    main()
