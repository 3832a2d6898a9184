"""The tiled softmax loss against open_clip's, one process, fp32, D = 512: peak memory and time of loss and gradient.

Every case runs in a process of its own, so that its peak is its own; what the process holds before the loss is taken
off. Without open_clip (extra ``parity``) its loss is written out: logits, twice cross-entropy.
Run: ``python -m tests.perf.contrastive_loss [--batches 8192 16384 32768] [--rounds 3]``. The dense loss at 32,768 needs
about 21 GB; with less memory free it is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.nn.contrastive import info_nce

WIDTH = 512
DENSE_BYTES_PER_PAIR = 20


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one rank."""
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        logits, here = scale * image @ text.T, torch.arange(len(image))
        return (functional.cross_entropy(logits, here) + functional.cross_entropy(logits.T, here)) / 2
    return ClipLoss()(image, text, scale)


def measure(kind: str, batch: int, threads: int, answer: Any) -> None:
    """Seconds, bytes of peak memory above the start, and the loss."""
    torch.set_num_threads(threads)
    draw = torch.randn(2, batch, WIDTH, generator=torch.Generator().manual_seed(0))
    image, text = (functional.normalize(x, dim=1).requires_grad_() for x in draw)
    scale = torch.tensor([14.3], requires_grad=True)
    loss_of = {"tiled": info_nce, "dense": dense}[kind]
    loss_of(image[:64], text[:64], scale).backward()
    image.grad = text.grad = scale.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    loss = loss_of(image, text, scale).squeeze()
    loss.backward()
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    answer.send((seconds, peak, float(loss.detach())))


def alone(kind: str, batch: int, threads: int) -> tuple[float, int, float]:
    """:func:`measure` in a fresh process."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(kind, batch, threads, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def free_bytes() -> int:
    """Main memory that a process may still take."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.rounds}, fp32, D = {WIDTH}")
    for batch in args.batches:
        kinds = ["tiled", "dense"] if DENSE_BYTES_PER_PAIR * batch**2 < 0.8 * free_bytes() else ["tiled"]
        found: dict[str, list[tuple[float, int, float]]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind in kinds:
                found[kind].append(alone(kind, batch, args.threads))
        for kind, runs in found.items():
            seconds, peak = (statistics.median(r[i] for r in runs) for i in (0, 1))
            print(
                f"B {batch:6d} {kind}: {seconds:7.2f} s, peak {peak / 1e6:9.1f} MB, loss {runs[0][2]:.6f}", flush=True
            )
        if "dense" in found:
            time_ratio = statistics.median(t[0] / d[0] for t, d in zip(found["tiled"], found["dense"], strict=True))
            memory = statistics.median(d[1] for d in found["dense"]) / statistics.median(t[1] for t in found["tiled"])
            print(f"B {batch:6d} ratio: time {time_ratio:.2f} of dense, memory {memory:.1f} times less")
        else:
            print(f"B {batch:6d} dense left out: {DENSE_BYTES_PER_PAIR * batch**2 / 1e9:.0f} GB are not free")


if __name__ == "__main__":
    main()
