"""The whole loader with two workers: shards on disk to batches in the training process, against webdataset's.

python -m tests.perf.stream_loader
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from torchvision import transforms

from pipeline.config.schema import Data, Image
from pipeline.core.manifest import Manifest
from pipeline.data.stream import open_stream
from tests.perf.stream_corpus import Timed, compare, jpeg, shards, timed, trials

WORKERS, BATCH, BATCHES, WARM_UP, IMAGES = 2, 32, 24, 6, 192


def stock(manifest: Manifest) -> webdataset.WebLoader:
    """webdataset, Pillow, torchvision v1 to float32, in a DataLoader: as OpenCLIP trains."""
    crop = transforms.RandomResizedCrop(224, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    urls = [f"{manifest.root}/{s.name}" for s in manifest.shards]
    pipeline = webdataset.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node)
    pipeline = pipeline.shuffle(100).decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH)
    return webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS)


def steady(batches: Iterator[object]) -> Timed:
    """How long some batches take, once the loader runs and what it has made ahead is used up."""
    for _ in range(WARM_UP):
        next(batches)
    return timed(lambda: [next(batches) for _ in range(BATCHES)])


def main() -> None:
    """By the wall clock. Each loader is started anew for each trial, so that only one works at a time."""
    rounds = trials(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        manifest = shards(Path(folder), [jpeg(i) for i in range(IMAGES)], IMAGES // 8)
        data = Data(
            train=folder, fields=("image", "label"), image=Image(scale=(0.08, 1.0)), workers=WORKERS, tail="endless"
        )

        def theirs() -> Timed:
            return steady(iter(stock(manifest)))

        def ours() -> Timed:
            stream = open_stream(data, manifest, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1)
            found = steady(stream.batches(0))
            stream.close()
            return found

        compare(
            f"{WORKERS} workers, batches of {BATCH} at 224",
            "images",
            BATCH * BATCHES,
            {"webdataset, torchvision v1, float32 *": theirs, "ours, uint8 *": ours},
            rounds,
        )


if __name__ == "__main__":
    main()
