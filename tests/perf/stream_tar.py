"""One core: reading samples out of tars without decoding, against webdataset and Python's tarfile.

python -m tests.perf.stream_tar
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import webdataset

from pipeline.core.manifest import Manifest
from pipeline.data.access import open_storage
from pipeline.data.order import Order, default_lanes
from pipeline.data.reader import Reader
from tests.perf.stream_corpus import compare, shards, trials, unchecked

BATCH = 64


def ways(manifest: Manifest, without: Manifest) -> dict:
    """How to read all samples: each way returns their number; ``without``: what webdataset checks, which is nothing."""
    urls = [f"{manifest.root}/{s.name}" for s in manifest.shards]
    order = Order(np.array(manifest.starts), 0, BATCH, default_lanes(BATCH, len(urls), manifest.samples), 4, "drop")

    def stock() -> int:
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))

    def plain() -> int:
        count = 0
        for url in urls:
            with tarfile.open(url) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file
                    count += len(file.read()) > 0
        return count

    def ours(batches: list[np.ndarray], manifest: Manifest = manifest) -> int:
        reader = Reader(manifest, ("image", "label"), (), open_storage(manifest), 64 * 10**6)
        count = sum(len(part.found) for ids in batches for part in reader.read(ids))
        reader.close()
        return count

    in_order = [np.arange(i, min(i + BATCH, manifest.samples)) for i in range(0, manifest.samples, BATCH)]
    stream = [order.batch(t, 0, BATCH).id for t in range(manifest.samples // BATCH)]
    return {
        "webdataset": stock,
        "tarfile": plain,
        "ours, in the order of the tars": lambda: ours(in_order),
        "ours, in the order of the stream": lambda: ours(stream),
        "ours, contents not checked, in the order of the tars": lambda: ours(in_order, without),
        "ours, contents not checked, in the order of the stream": lambda: ours(stream, without),
    }


def main() -> None:
    """Two sizes of samples."""
    rounds = trials(__doc__)
    rng = np.random.default_rng(0)
    for size, count in ((130_000, 1536), (2_000, 16_384)):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            block = rng.bytes(size)
            manifest = shards(Path(folder), [block] * count, count // 8)
            both = ways(manifest, unchecked(manifest, Path(folder) / "unchecked"))
            compare(f"{count:,} samples of {size:,} bytes, one core", "samples", count, both, rounds)


if __name__ == "__main__":
    main()
