"""MAE on a GPU: images/s, model FLOP utilisation and memory of ViT-B, L and H at 224 in bf16, loop included.

Utilisation is that of PaLM's appendix B (Chowdhery et al. 2022): the operations that the model needs, three times those
of its forward (which torch counts), over the dense bf16 peak; what checkpointing computes twice is not counted.
Run: ``python -m tests.perf.mae_gpu [--batch 256] [--compile] [--checkpointing]``.
"""

from __future__ import annotations

import argparse
import gc
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.protocols import DataFacts
from pipeline.dist.group import Place, process_group
from pipeline.objectives.mae import MAE, Config
from tests.perf.mae_step import SIZE, images, ours

ENCODERS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 operations per second as their makers state them (SXM boards), by a part of the device's name."""


def forward_flops(config: Config, size: tuple[int, int]) -> int:
    """Operations (two per multiply-add) of matrix products in one image's forward, encoder and decoder."""
    with torch.device("meta"):
        model = MAE(config, DataFacts(size, ())).eval()
        keep = torch.empty(1, model.visible, dtype=torch.int64)
        x = torch.empty(1, len(config.mean), *size)
        # Fused attention of some devices is not among the operations that torch can count.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.reconstruct(x, keep)
    return counter.get_total_flops()


def peak_of(device: str) -> float | None:
    """The device's peak, if it is known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def measure(config: Config, batch: int, steps: int, rounds: int, place: Place) -> list[float]:
    """Images per second in each round, after a round that compiles and chooses kernels."""
    pinned = {name: value.pin_memory() for name, value in images(batch).items()}  # as the stream delivers them
    run = ours(config, "bf16", pinned, place)
    run(3)
    return [batch * steps / run(steps) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; tests/perf/mae_step.py is the one for a CPU")
    device = torch.cuda.get_device_name()
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_of(device)
    print(f"{device}, torch {torch.__version__}, batch {args.batch}, {args.steps} steps a round")
    with process_group(5.0) as place:
        for name in args.encoders:
            config = Config(encoder=name, compile=args.compile, checkpointing=args.checkpointing)
            gc.collect()  # the model before is in cycles
            torch.cuda.reset_peak_memory_stats()
            rates = measure(config, args.batch, args.steps, args.rounds, place)
            rate, flops = statistics.median(rates), 3 * forward_flops(config, SIZE)
            used = f"{rate * flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown: --peak-tflops"
            print(
                f"{name}: {rate:.0f} images/s ({min(rates):.0f} to {max(rates):.0f}), {flops / 1e9:.1f} GFLOP each, "
                f"{rate * flops / 1e12:.0f} TFLOP/s ({used}), {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
