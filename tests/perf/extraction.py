"""Extraction of features beside the bare encoder over tensors in memory: ViT-S at 224, on CPUs.

In turns: the encoder alone; the pass of an evaluation over batches that are in memory; the stream alone, with one
loader process (JPEG files as of ImageNet, decoded, resized, cropped); the pass over that stream. Run:
``python -m tests.perf.extraction [--images 96] [--batch 32] [--rounds 3]``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.schema import Image
from pipeline.core.evaluation import OWN
from pipeline.core.protocols import Batch
from pipeline.data.evaluation import open_eval
from pipeline.dist.group import process_group
from pipeline.suites.features import extract
from tests.perf.head_grid import small_encoder
from tests.perf.stream_corpus import jpeg, own_seconds, shards


class InMemory:
    """A stream whose batches are there."""

    classes = tuple("0123456789")
    fingerprint = "none"

    def __init__(self, image: Tensor, batch: int) -> None:
        self.samples = len(image)
        ids = torch.arange(self.samples)
        parts = zip(image.split(batch), ids.split(batch), strict=True)
        self.batches: list[Batch] = [{"image": own, "id": number, "label": number % 10} for own, number in parts]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def main() -> None:
    """Print seconds by the clock and of the processor, and ratios to the encoder alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = small_encoder()
    memory = InMemory(torch.randint(256, (args.images, 3, 224, 224), dtype=torch.uint8), args.batch)
    with tempfile.TemporaryDirectory() as name, process_group(1), torch.no_grad():
        folder = Path(name)
        shards(folder, [jpeg(number) for number in range(args.images)], args.images // 4)
        image = Image(size=224, crop="center")
        stream = open_eval(os.fspath(folder), image, ("image", "label"), batch=args.batch, workers=1)
        ways: dict[str, Callable[[], object]] = {
            "encoder alone": lambda: [encoder(batch["image"]) for batch in memory],
            "pass over batches in memory": lambda: extract(encoder, memory, [OWN], ["label"]),
            "stream alone, one loader process": lambda: [None for _ in stream],
            "pass over the stream": lambda: extract(encoder, stream, [OWN], ["label"]),
        }
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(args.rounds + 1):
            for way, action in ways.items():
                clock, used = time.perf_counter(), own_seconds()
                action()
                if turn:  # the first starts processes and warms caches
                    found[way].append((time.perf_counter() - clock, own_seconds() - used))
        stream.close()
    print(f"{args.images} images, batches of {args.batch}, {args.threads} threads, torch {torch.__version__}")
    bare = found["encoder alone"]
    for way, own in found.items():
        told: list[str] = []
        for what, column in (("by the clock", 0), ("of the processor", 1)):
            values = [one[column] for one in own]
            ratio = statistics.median(one[column] / base[column] for one, base in zip(own, bare, strict=True))
            spread = f"{min(values):.2f} to {max(values):.2f}"
            told.append(f"{statistics.median(values):.2f} s {what} ({spread}), {ratio:.3f} of the encoder's")
        print(f"{way}: {'; '.join(told)}")


if __name__ == "__main__":
    main()
