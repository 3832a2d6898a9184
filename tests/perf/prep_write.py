"""Writing shards as they are: ours, with sha256, member offsets and the note to resume from, against webdataset's.

Both write an image, a label and a caption per sample to memory (/dev/shm, where there is one).
Run: ``python -m tests.perf.prep_write [--trials 7]``.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import webdataset

from data_prep.options import Options
from data_prep.prepare import Sample
from data_prep.record import Inline, Record
from data_prep.shards import SplitWriter
from data_prep.statistics import Facts
from data_prep.store import LocalStore
from tests.perf.stream_corpus import compare, trials

FACTS = Facts(500, 375, 130_000, 20, 3, (1, 2, 3, 4, 5, 6))


def _ours(folder: Path, contents: list[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    writer = SplitWriter(LocalStore(folder), "train", Options({}), 0, [])
    for i, data in enumerate(contents):
        record = Record(f"{i:08d}", f"{i:08d}", Inline(data), "stamp")
        members = (("jpg", data), ("cls", b"3"), ("txt", b"a caption of this one"))
        writer.add(i, record, Sample(members, FACTS, ()))
    writer.close_shard(len(contents))


def _theirs(folder: Path, contents: list[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/x-%06d.tar", maxcount=1000, verbose=0) as sink:
        for i, data in enumerate(contents):
            sink.write({"__key__": f"{i:08d}", "jpg": data, "cls": b"3", "txt": b"a caption of this one"})


def main() -> None:
    wanted = trials(__doc__)
    rng = np.random.default_rng(0)
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        for size, count in ((130_000, 2000), (2_000, 10_000)):
            contents = [rng.bytes(size) for _ in range(100)] * (count // 100)
            compare(
                f"Writing {count} samples of {size // 1000} kB",
                "samples",
                count,
                {
                    "webdataset ShardWriter": lambda c=contents: _theirs(folder / "a", c),
                    "ours, sha256 + offsets": lambda c=contents: _ours(folder / "b", c),
                },
                wanted,
            )


if __name__ == "__main__":
    main()
