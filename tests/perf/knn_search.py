"""Nearest neighbours against the bare product of queries and bank in the same chunks: time, and memory beyond features.

python -m tests.perf.knn_search [--samples 50000] [--width 384] [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.evaluation import Features
from pipeline.dist.group import process_group
from pipeline.evals.knn import KNN, QUERIES, Config
from tests.perf.stream_corpus import timed


class Given:
    """Features that were extracted before, as an evaluation is given them."""

    def __init__(self, features: Features, place: object) -> None:
        self.place, self._features = place, features

    def features(self, encoder: str, stream: str) -> Features:
        return self._features


def product(x: Tensor, unit: Tensor) -> None:
    """Of all queries with the bank, each chunk in memory of its own."""
    for first in range(0, len(x), QUERIES):
        _ = unit[first : first + QUERIES] @ unit.T


def product_into(x: Tensor, unit: Tensor, space: Tensor) -> None:
    """The same into memory that is used again."""
    for first in range(0, len(x), QUERIES):
        query = unit[first : first + QUERIES]
        torch.mm(query, unit.T, out=space[: len(query)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.samples, args.width)
    label = torch.arange(args.samples) % args.classes
    features = Features(x, {"label": label}, tuple(map(str, range(args.classes))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with process_group(1) as place, torch.no_grad():
        ctx = Given(features, place)
        evaluate = lambda: list(KNN(Config()).run(ctx))  # noqa: E731
        evaluate()
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        unit = functional.normalize(x)
        space = torch.empty(QUERIES, args.samples)
        ways: dict[str, Callable[[], object]] = {
            "product, new memory for each chunk": lambda: product(x, unit),
            "product, in the same memory": lambda: product_into(x, unit, space),
            "knn, k = 10, 20, 100, 200": evaluate,
        }
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                found = timed(way)
                seconds[name].append(found.seconds)
    print(f"{args.samples} x {args.samples} x {args.width}, {args.threads} threads, torch {torch.__version__}")
    first, second, _ = seconds.values()
    for name, own in seconds.items():
        ratios = ["/".join(f"{s / b:.2f}" for s, b in zip(own, base, strict=True)) for base in (first, second)]
        print(
            f"{name}: {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f}); of the first {ratios[0]}; "
            f"of the second {ratios[1]}"
        )
    print(f"knn takes {extra / 1e9:.2f} GB beyond the features")


if __name__ == "__main__":
    main()
