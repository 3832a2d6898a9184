"""Sampling part by part with what is known kept, beside computing all anew for each part.

Command: python -m tests.perf.autoregressive_sampling [--samples 4] [--repeats 3] [--processor-time]
A PixelCNN++ of 16x16 pixels and a transformer over 16x16 codes, both small, in turn in one process. Prints seconds for
all samples and the ratio naive / kept over the repeats, and whether the samples are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.nn.generative.causal_transformer import CausalTransformer, TransformerConfig
from pipeline.nn.generative.pixelcnn import PixelCNN, PixelCNNConfig

SIDE = 16


def pixelcnn(samples: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Both ways of sampling."""
    model = PixelCNN(PixelCNNConfig(filters=32, blocks=2, sizes=3, components=5), (3, SIDE, SIDE)).eval()
    uniform = torch.rand(samples, SIDE * SIDE, 4)
    return lambda: model.sample(uniform), lambda: model.sample_naively(uniform)


def transformer(samples: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Likewise."""
    config = TransformerConfig(name="transformer", dim=192, depth=6, heads=6)
    model = CausalTransformer(config, codes=512, length=SIDE * SIDE).eval()
    uniform = torch.rand(samples, SIDE * SIDE)
    return lambda: model.sample(uniform), lambda: model.sample_naively(uniform)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    print(
        f"{torch.get_num_threads()} threads, fp32, torch {torch.__version__}, {args.samples} samples of {SIDE}x{SIDE}"
    )
    for name, build in {"pixelcnn": pixelcnn, "transformer": transformer}.items():
        torch.manual_seed(0)
        ways, taken, made = build(args.samples), [list[float](), list[float]()], list[Tensor]()
        for _ in range(args.repeats):
            made = []
            for way, seconds in zip(ways, taken, strict=True):
                begin = clock()
                made.append(way())
                seconds.append(clock() - begin)
        ratios = [naive / kept for kept, naive in zip(*taken, strict=True)]
        same = float((made[0] == made[1]).flatten(1).all(dim=1).float().mean())
        print(
            f"{name}: kept {statistics.median(taken[0]):.2f} s, naive {statistics.median(taken[1]):.2f} s, "
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), same samples {same:.0%}"
        )


if __name__ == "__main__":
    main()
