"""The whole loader with two workers: shards on disk to batches in the training process, against webdataset's.

python -m tests.perf.stream_loader
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import torch
import webdataset
from torchvision import transforms

from pipeline.config.schema import Data, Image
from pipeline.core.manifest import Manifest
from pipeline.data.stream import open_stream
from tests.perf.stream_corpus import compare, jpeg, shards, trials

WORKERS, BATCH, BATCHES, IMAGES = 2, 32, 12, 192


def stock(manifest: Manifest) -> webdataset.WebLoader:
    """webdataset, Pillow, torchvision v1 to float32, in a DataLoader: as OpenCLIP trains."""
    crop = transforms.RandomResizedCrop(224, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    urls = [f"{manifest.root}/{s.name}" for s in manifest.shards]
    pipeline = webdataset.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node)
    pipeline = pipeline.shuffle(100).decode("pilrgb").to_tuple("jpg", "cls").map_tuple(transform, int).batched(BATCH)
    return webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS)


def main() -> None:
    """Steady rate, after the first batches; by the wall clock, so only worth something on a quiet machine."""
    rounds = trials(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        manifest = shards(Path(folder), [jpeg(i) for i in range(IMAGES)], IMAGES // 8)
        theirs = iter(stock(manifest))
        data = Data(
            train=folder, fields=("image", "label"), image=Image(scale=(0.08, 1.0)), workers=WORKERS, tail="endless"
        )
        stream = open_stream(data, manifest, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1)
        ours = stream.batches(0)
        compare(
            f"{WORKERS} workers, batches of {BATCH} at 224",
            "images",
            BATCH * BATCHES,
            {
                "webdataset, torchvision v1, float32 *": lambda: [next(theirs) for _ in range(BATCHES)],
                "ours, uint8 *": lambda: list(itertools.islice(ours, BATCHES)),
            },
            rounds,
        )
        stream.close()


if __name__ == "__main__":
    main()
