"""The linear probe's grid of 52 heads beside one head: training and scoring alone, and with the pass of the encoder.

Features are random: what they are changes no time. The pass is timed on a few images and taken as so long for each.
Run: ``python -m tests.perf.head_grid [--samples 8192] [--classes 100] [--epochs 10] [--rounds 3]``.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from pipeline.core.evaluation import Reading
from pipeline.evals._heads import Course, Head, Heads
from pipeline.evals.linear_probe import RATES
from pipeline.nn.construct import construct_encoder
from pipeline.nn.encoder import EncoderConfig, ImageEncoder
from pipeline.nn.reading import read
from tests.perf.stream_corpus import timed

WIDTH, BATCH = 384, 1024
BLOCKS = 4
READINGS = [Reading(blocks, pool) for blocks in (1, BLOCKS) for pool in ("cls", "cls+mean")]
COLUMNS = {
    Reading(blocks, pool): slice((BLOCKS - blocks) * WIDTH, (BLOCKS + (pool != "cls")) * WIDTH)
    for blocks, pool in READINGS
}


def small_encoder() -> ImageEncoder:
    """ViT-S for images of 224, with random weights."""
    config = EncoderConfig(encoder="vit_small_patch16_224")
    return construct_encoder(config, (224, 224), "eval", start=None, pool="cls").eval()


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.samples, (BLOCKS + 1) * WIDTH)
    label, places = torch.randint(args.classes, (args.samples,)), torch.arange(args.samples)
    course = Course(args.epochs * args.samples // BATCH, BATCH, False, 0)
    encoder = small_encoder()
    images = torch.randint(256, (args.images, 3, 224, 224), dtype=torch.uint8)

    def probe(grid: list[Head]) -> None:
        heads = Heads(grid, COLUMNS, args.classes, course, x.device)
        heads.train(x, label, places)
        heads.hits(x, label, places[: args.samples // 10])

    deepest = Reading(BLOCKS, "cls+mean")
    grids = {
        "52 heads": [Head(rate, reading) for reading in READINGS for rate in RATES],
        "one head, of the largest reading": [Head(RATES[6], deepest)],
        "one head, of the smallest": [Head(RATES[6], Reading(1, "cls"))],
    }
    seconds: dict[str, list[float]] = {name: [] for name in grids}
    passes: list[float] = []
    with torch.no_grad():
        for _ in range(args.rounds):
            passes.append(timed(lambda: read(encoder, images, [deepest])).seconds / args.images * args.samples)
            for name, grid in grids.items():
                seconds[name].append(timed(lambda grid=grid: probe(grid)).seconds)
    print(f"{args.samples} samples, {args.classes} classes, {course.steps} steps of {BATCH}, {args.threads} threads")
    print(f"pass of ViT-S at 224: {statistics.median(passes):.1f} s ({min(passes):.1f} to {max(passes):.1f})")
    grid, *singles = seconds
    for name, own in seconds.items():
        print(f"{name}: {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f})")
    for name in singles:
        bare = [a / b for a, b in zip(seconds[grid], seconds[name], strict=True)]
        whole = [(p + a) / (p + b) for p, a, b in zip(passes, seconds[grid], seconds[name], strict=True)]
        print(f"52 heads of {name}: {statistics.median(bare):.1f}, with the pass {statistics.median(whole):.3f}")


if __name__ == "__main__":
    main()
