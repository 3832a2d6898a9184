"""k-means of all ranks' rows against faiss' (pip install faiss-cpu), from the same first centres, on one rank.

python -m tests.perf.kmeans [--samples 1000000] [--width 256] [--clusters 1000] [--iterations 2] [--rounds 3]

Rounds are taken in turn. Seconds are those of the processor, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from pipeline.dist.group import process_group
from pipeline.nn.clustering.kmeans import Clusters, kmeans


def peak() -> int:
    """Bytes of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_faiss(x: np.ndarray, centres: np.ndarray, iterations: int) -> np.ndarray:
    """Labels after so many iterations over all samples, as DeepCluster runs it."""
    import faiss  # pyright: ignore[reportMissingImports]

    how = faiss.Clustering(x.shape[1], len(centres))
    how.niter, how.max_points_per_centroid, how.min_points_per_centroid = iterations, len(x), 1
    faiss.copy_array_to_vector(centres.ravel(), how.centroids)
    index = faiss.IndexFlatL2(x.shape[1])
    how.train(x, index)
    return index.search(x, 1)[1].ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(args.threads)
    except ImportError:
        raise SystemExit("faiss is not installed: pip install faiss-cpu") from None
    torch.manual_seed(0)
    x = functional.normalize(torch.randn(args.samples, args.width))
    draws = torch.rand(args.samples, dtype=torch.float64)
    start = x[draws.argsort()[: args.clusters]].numpy().copy()
    found: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {"kmeans": [], "faiss": []}
    with process_group(1):

        def ours() -> np.ndarray:
            result: Clusters = kmeans(x, args.clusters, draws, args.iterations)
            return result.label.numpy()

        ways: dict[str, Callable[[], np.ndarray]] = {
            "kmeans": ours,
            "faiss": lambda: by_faiss(x.numpy(), start, args.iterations),
        }
        before = peak()
        found["kmeans"] = ways["kmeans"]()
        extra = peak() - before
        for _ in range(args.rounds):
            for name, way in ways.items():
                began = time.process_time()
                found[name] = way()
                seconds[name].append(time.process_time() - began)
    ratios = [ours / theirs for ours, theirs in zip(seconds["kmeans"], seconds["faiss"], strict=True)]
    print(
        f"{args.samples} x {args.width} into {args.clusters} clusters, {args.iterations} iterations, "
        f"{args.threads} threads, torch {torch.__version__}, faiss {faiss.__version__}"
    )
    for name, own in seconds.items():
        print(f"{name}: {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f})")
    same = float((found["kmeans"] == found["faiss"]).mean())
    print(f"of faiss: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"the same cluster: {same:.4%} of the samples; kmeans takes {extra / 1e6:.0f} MB beyond the features")


if __name__ == "__main__":
    main()
