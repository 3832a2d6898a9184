"""One core: SimCLR's two views from tars to normalised floats, colour included, against the stock pipeline.

The stock pipeline is webdataset, Pillow and torchvision's v1 transforms, image by image. Ours crops in the loader and
does colour for whole batches, as on a device; here the device is the CPU.

python -m tests.perf.stream_simclr
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import webdataset
from torch import Tensor
from torchvision import transforms

from pipeline.config.schema import Data, Image
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch, Clock, StepContext
from pipeline.data.stream import open_stream
from pipeline.nn.augment import Colour, augment
from tests.perf.stream_corpus import compare, jpeg, shards, trials

IMAGES, BATCH, COPIES = 32, 32, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stock(manifest: Manifest) -> int:
    """All samples once, each in two views."""
    crop = transforms.RandomResizedCrop(224, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    view = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    urls = [f"{manifest.root}/{s.name}" for s in manifest.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb").to_tuple("jpg")
    return sum(len((view(image), view(image))) for (image,) in samples)


def colour(batch: Batch) -> list[Tensor]:
    """What the objective does with a batch."""
    ctx = StepContext(0, Clock(0, 0, 1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return [(augment(batch[name], batch, ctx, Colour(), name) - mean) / std for name in ("image", "image2")]


def main() -> None:
    """Print rates, and what colour takes of ours."""
    rounds = trials(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        manifest = shards(Path(folder), [jpeg(i) for i in range(IMAGES)] * COPIES, IMAGES // 2)
        settings = Data(train=folder, image=Image(scale=(0.08, 1.0), views=2), workers=0)
        stream = open_stream(settings, manifest, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1)
        batches = stream.batches(0)
        steps = range(IMAGES * COPIES // BATCH)
        compare(
            "Two views of SimCLR, one core",
            "pairs",
            IMAGES * COPIES,
            {
                "webdataset, Pillow, torchvision v1": lambda: stock(manifest),
                "ours, colour in batches": lambda: [colour(next(batches)[0]) for _ in steps],
                "ours, without colour": lambda: [next(batches) for _ in steps],
            },
            rounds,
        )
        stream.close()


if __name__ == "__main__":
    main()
