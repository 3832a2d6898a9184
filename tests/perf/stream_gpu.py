"""On a GPU: whole batches of crops on the device, decoded there or by the loader's processes.

python -m tests.perf.stream_gpu [--workers 8]
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config.schema import Data, Image
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch
from pipeline.data.stream import TrainStream, open_stream
from tests.perf.stream_corpus import compare, jpeg, shards

IMAGES, BATCH, BATCHES = 256, 256, 16
GPU = torch.device("cuda")


def opened(manifest: Manifest, decode: str, workers: int) -> TrainStream:
    """The stream of one rank."""
    data = Data.model_validate(
        {
            "train": manifest.root,
            "image": Image(scale=(0.08, 1.0)),
            "decode": decode,
            "workers": workers,
            "tail": "endless",
        }
    )
    return open_stream(data, manifest, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1, device=GPU)


def take(batches: Iterator[list[Batch]]) -> None:
    """Some batches, all on the device in the end."""
    for (batch,) in itertools.islice(batches, BATCHES):
        batch["image"].to(GPU, non_blocking=True)
    torch.cuda.synchronize()


def main() -> None:
    """Print images per second of both ways, and how far the pixels are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--trials", type=int, default=5)
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU")
        return
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, {wanted.workers} loader processes")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        manifest = shards(Path(folder), [jpeg(i) for i in range(IMAGES)] * 4, IMAGES // 4)
        streams = {decode: opened(manifest, decode, wanted.workers) for decode in ("loader", "device")}
        first, second = (next(s.batches(0))[0]["image"].to(GPU).float() for s in streams.values())
        print(f"mean difference of the pixels: {(first - second).abs().mean():.3f}/255")
        walks = {decode: stream.batches(1) for decode, stream in streams.items()}
        compare(
            "RandomResizedCrop(224) and flip, batches on the device",
            "images",
            BATCH * BATCHES,
            {f"decoded by the {decode} *": lambda walk=walk: take(walk) for decode, walk in walks.items()},
            wanted.trials,
        )
        for stream in streams.values():
            stream.close()


if __name__ == "__main__":
    main()
