"""The tiled losses against open_clip's, fp32, D = 512: peak memory and time of loss and gradient, alone and over ranks.

Softmax stands against ``ClipLoss`` (over ranks with ``local_loss=True, gather_with_grad=True``), sigmoid against
``SigLipLoss``. Every measurement runs in processes of its own, so that a peak is its own; what a process holds before
the loss is taken off. Over ranks the slowest rank's time counts, and the largest rank's peak. With little memory free,
open_clip's loss is left out.

Run: ``python -m tests.perf.contrastive_loss [--ranks 1 2 4] [--batches 8192 16384 32768] [--rounds 3]``, where a batch
is that of all ranks, and on an accelerator ``--device cuda --batches 32768 65536 131072 262144``.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import resource
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.nn.contrastive import info_nce, sigmoid_loss
from tests.ranks import free_port, rank_environment

WIDTH = 512
THEIR_BYTES_PER_PAIR = 20


class Case(NamedTuple):
    """One measurement."""

    ours: bool
    loss: str
    batch: int
    """Over all ranks."""
    world: int
    device: str
    threads: int


class Found(NamedTuple):
    """What came out of it."""

    seconds: float
    peak: float
    """Bytes above the start."""
    loss: float


def value(case: Case, rank: int, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of one side."""
    if case.ours:
        return info_nce(image, text, scale) if case.loss == "softmax" else sigmoid_loss(image, text, scale, bias)
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "sigmoid":
        return SigLipLoss(rank=rank, world_size=case.world)(image, text, scale, bias)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=case.world)(image, text, scale)


def measure(case: Case, rank: int, port: int, answer: Any) -> None:
    """One rank of a case: warm up on few rows, then measure one loss and gradient."""
    os.environ.update(rank_environment(rank, case.world, port))
    torch.set_num_threads(case.threads)
    if case.world > 1:
        dist.init_process_group("gloo" if case.device == "cpu" else "nccl")
    rows = case.batch // case.world
    draw = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(rank)).to(case.device)
    image, text = (functional.normalize(x, dim=1).requires_grad_() for x in draw)
    scale, bias = (torch.tensor([x], device=case.device, requires_grad=True) for x in (14.3, -10.0))
    value(case, rank, image[:64], text[:64], scale, bias).backward()
    image.grad = text.grad = scale.grad = bias.grad = None
    before = _peak(case.device, reset=True)
    if case.world > 1:
        dist.barrier()
    began = time.perf_counter()
    loss = value(case, rank, image, text, scale, bias).squeeze()
    loss.backward()
    if case.device == "cuda":
        torch.cuda.synchronize()
    answer.send(Found(time.perf_counter() - began, _peak(case.device) - before, float(loss.detach())))
    if case.world > 1:
        dist.destroy_process_group()


def _peak(device: str, reset: bool = False) -> float:
    """Most bytes held so far; ``reset``: from here on, where that can be."""
    if device == "cuda":
        if reset:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(case: Case) -> Found:
    """All ranks of a case, in fresh processes."""
    context, port = mp.get_context("spawn"), free_port()
    ranks = []
    for rank in range(case.world):
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(case, rank, port, there))
        process.start()
        there.close()
        ranks.append((process, here))
    found = [here.recv() for _, here in ranks]
    for process, _ in ranks:
        process.join()
    return Found(max(f.seconds for f in found), max(f.peak for f in found), statistics.mean(f.loss for f in found))


def free_bytes(device: str) -> float:
    """Memory that may still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def compare(case: Case, rounds: int) -> None:
    """Both sides in turn, so that what else the machine does meets both; a line each, and their ratio."""
    # Each rank holds a share of the pairs; on one machine the shares add up.
    needed = THEIR_BYTES_PER_PAIR * case.batch**2
    sides = {"ours": case, "open_clip": case._replace(ours=False)}
    if needed > 0.8 * free_bytes(case.device):
        del sides["open_clip"]
    found: dict[str, list[Found]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, own in sides.items():
            found[side].append(run(own))
    name = f"{case.loss} B {case.batch:6d} ranks {case.world}"
    middle = {side: [statistics.median(r[i] for r in runs) for i in (0, 1)] for side, runs in found.items()}
    for side, (seconds, peak) in middle.items():
        spread = max(r.seconds for r in found[side]) - min(r.seconds for r in found[side])
        print(
            f"{name} {side:9s}: {seconds:8.3f} s (spread {spread:.3f}), peak {peak / 1e6:8.1f} MB per rank, "
            f"loss {found[side][0].loss:.6f}",
            flush=True,
        )
    if "open_clip" not in middle:
        print(f"{name} open_clip left out: {needed / 1e9:.0f} GB are not free", flush=True)
        return
    time_ratio = statistics.median(o.seconds / t.seconds for o, t in zip(*found.values(), strict=True))
    memory = middle["open_clip"][1] / middle["ours"][1]
    print(f"{name} ratio: time {time_ratio:.2f} of open_clip's, memory {memory:.1f} times less", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", nargs="+", default=["softmax"], choices=["softmax", "sigmoid"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} thread(s) a rank, median of {args.rounds}, fp32, D = {WIDTH}")
    for loss in args.losses:
        for world in args.ranks:
            for batch in args.batches:
                compare(Case(True, loss, batch, world, args.device, args.threads), args.rounds)


if __name__ == "__main__":
    main()
