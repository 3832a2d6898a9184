"""The linear probe's fit against scikit-learn's LogisticRegression: same problem, same number of iterations.

Run: ``python -m tests.perf.linear_probe [--samples 15000] [--dim 128] [--classes 100] [--rounds 3]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from sklearn.linear_model import LogisticRegression

from pipeline.evals.linear_probe import Config, LinearProbe

ITERATIONS = 50
L2 = 1e-4


def main() -> None:
    """Print seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("samples", 15_000), ("dim", 128), ("classes", 100), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    label = torch.arange(args.samples) % args.classes
    x = torch.randn(args.classes, args.dim)[label] + 3 * torch.randn(args.samples, args.dim)
    start = torch.zeros(args.dim + 1, args.classes, dtype=torch.float64)
    probe = LinearProbe(Config(max_iterations=ITERATIONS))
    ours, peer = [], []
    for _ in range(args.rounds):
        began = time.perf_counter()
        probe._fit(start, x, label, L2)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            LogisticRegression(C=1 / (L2 * len(x)), max_iter=ITERATIONS).fit(x.numpy(), label.numpy())
        peer.append(time.perf_counter() - began)
    a, b = statistics.median(ours), statistics.median(peer)
    print(f"{ITERATIONS} iterations: ours {a:.2f} s, scikit-learn {b:.2f} s: {b / a:.1f} times as fast (medians)")


if __name__ == "__main__":
    main()
