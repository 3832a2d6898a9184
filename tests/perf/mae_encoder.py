"""The encoder's cost follows the number of visible patches: time at 0, 50, 75 and 90 % masking, forward and backward.

Run: ``python -m tests.perf.mae_encoder [--encoder vit_base_patch16_224] [--batch 8] [--rounds 5]``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from pipeline.core.protocols import DataFacts
from pipeline.nn.masking import encode_visible
from pipeline.objectives.mae import MAE, Config

RATIOS = (0.0, 0.5, 0.75, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    model = MAE(Config(encoder=args.encoder), DataFacts((224, 224), ()))
    n = model.geometry.patches
    x = torch.randn(args.batch, 3, 224, 224)
    order = torch.stack([torch.randperm(n) for _ in range(args.batch)])
    seconds: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    for measured in [False] + [True] * args.rounds:
        for ratio in RATIOS:
            keep = order[:, : n - int(n * ratio)]
            began = clock()
            encode_visible(model.encoder, x, keep).square().mean().backward()
            if measured:
                seconds[ratio].append(clock() - began)
    whole = statistics.median(seconds[0.0])
    for ratio, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{ratio:.0%} masked: {middle:.3f} s ({spread}), {middle / whole:.2f} of unmasked")


if __name__ == "__main__":
    main()
