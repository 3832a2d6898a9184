"""The tiled losses against open_clip's, fp32, D = 512: peak memory and time of loss and gradient, alone and over ranks.

Softmax stands against ``ClipLoss`` (over ranks with ``local_loss=True, gather_with_grad=True``), sigmoid against
``SigLipLoss``; where open_clip is not installed, on one rank, against a transcription of them. Each side runs in
processes of its own, so that a peak is its own; what a process holds before the loss is taken off. Over ranks the
slowest rank's time counts, and the largest rank's peak. Where the peer's logits do not fit into the memory that is
free, or it runs out of it, ours stands alone. Beside ours stands the bound: the matrix products that it is made of (one
in the forward, three in the backward, tile by tile) and nothing else.

On a CPU every round is a process; on an accelerator the rounds follow each other in one, after a round that compiles.

Run: ``python -m tests.perf.contrastive_loss [--ranks 1 2 4] [--batches 8192 16384 32768] [--rounds 3]``, where a batch
is that of all ranks, and on an accelerator, with compiled kernels and without:
``python -m tests.perf.contrastive_loss --device cuda --batches 32768 65536 131072 262144 --kernels compiled plain``.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing as mp
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.nn import contrastive, tile_kernels
from tests.ranks import free_port, rank_environment

WIDTH = 512
THEIR_BYTES_PER_PAIR = 16
"""Two matrices of logits and their gradients in fp32: the least that the peer needs."""
OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
Side = Literal["plain", "compiled", "peer", "bound"]
OURS: tuple[Side, ...] = ("plain", "compiled")
"""Ours with each kind of kernels."""


class Case(NamedTuple):
    """One measurement."""

    side: Side
    loss: str
    batch: int
    """Over all ranks."""
    world: int
    device: str
    threads: int
    repeats: int
    """Measurements in the same process, after one that does not count; 0: one, after a small one."""
    precision: str
    """Of matrix products in fp32, as torch names them."""
    tile: int | None


class Found(NamedTuple):
    """What came out of it."""

    seconds: list[float]
    peak: float
    """Bytes above the start."""
    loss: float
    problem: str = ""
    """Why there is nothing."""


def transcribed(loss: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's losses on one rank, as ``open_clip/loss.py`` of version 3.3.0 computes them."""
    here = torch.arange(len(image), device=image.device)
    if loss == "softmax":
        per_image, per_text = scale * image @ text.T, scale * text @ image.T
        return (functional.cross_entropy(per_image, here) + functional.cross_entropy(per_text, here)) / 2
    logits = scale * image @ text.T
    logits += bias
    labels = 2 * torch.eye(len(image), device=image.device) - torch.ones_like(logits)
    return -functional.logsigmoid(labels * logits).sum() / len(image)


def value(case: Case, rank: int, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of one side."""
    if case.side in OURS:
        if case.loss == "softmax":
            return contrastive.info_nce(image, text, scale, tile=case.tile)
        return contrastive.sigmoid_loss(image, text, scale, bias, tile=case.tile)
    if not OPEN_CLIP:
        return transcribed(case.loss, image, text, scale, bias)
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "sigmoid":
        return SigLipLoss(rank=rank, world_size=case.world)(image, text, scale, bias)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=case.world)(image, text, scale)


def products(case: Case, rows: Tensor, columns: Tensor) -> None:
    """The matrix products of ours on one rank, by tiles, and nothing else."""
    size = case.tile or contrastive.TILES[case.device]
    by_row, by_column = torch.zeros_like(rows), torch.zeros_like(columns)
    tile = rows.new_empty(min(size, len(rows)), min(size, len(columns)))
    for backward in (False, True):
        for c in range(0, len(columns), size):
            cols = slice(c, c + size)
            for r in range(0, len(rows), size):
                here = slice(r, r + size)
                p = tile[: len(rows[here]), : len(columns[cols])]
                torch.mm(rows[here], columns[cols].T, out=p)
                if backward:
                    by_row[here].addmm_(p, columns[cols])
                    by_column[cols].addmm_(p.T, rows[here])


def measure(case: Case, rank: int, port: int, answer: Any) -> None:
    """One rank of a case: warm up, then measure loss and gradient; a lack of memory is an answer too."""
    try:
        answer.send(_measure(case, rank, port))
    except torch.OutOfMemoryError:
        answer.send(Found([], 0, 0, "ran out of memory"))
    if dist.is_initialized():
        dist.destroy_process_group()


def _measure(case: Case, rank: int, port: int) -> Found:
    os.environ.update(rank_environment(rank, case.world, port))
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    if case.world > 1:
        dist.init_process_group("gloo" if case.device == "cpu" else "nccl")
    torch.set_float32_matmul_precision(case.precision)
    tile_kernels.FUSE_FROM = 0 if case.side == "compiled" else 2**63
    draw = torch.randn(2, case.batch // case.world, WIDTH, generator=torch.Generator().manual_seed(rank))
    image, text = (functional.normalize(x, dim=1).to(case.device).requires_grad_() for x in draw)
    scale, bias = (torch.tensor([x], device=case.device, requires_grad=True) for x in (14.3, -10.0))
    losses = [0.0]

    def once(rows: int) -> None:
        if case.side == "bound":
            return products(case, image.detach()[:rows], text.detach()[:rows])
        image.grad = text.grad = scale.grad = bias.grad = None
        loss = value(case, rank, image[:rows], text[:rows], scale, bias).squeeze()
        loss.backward()
        losses.append(float(loss.detach()))

    once(len(image) if case.repeats else 64)
    image.grad = text.grad = scale.grad = bias.grad = None
    before = _peak(case.device, reset=True)
    seconds = [_timed(case, lambda: once(len(image))) for _ in range(max(case.repeats, 1))]
    return Found(seconds, _peak(case.device) - before, losses[-1])


def _timed(case: Case, work: Callable[[], None]) -> float:
    """Seconds from when all ranks are ready to when this one's device has done it."""
    if case.world > 1:
        dist.barrier()
    began = time.perf_counter()
    work()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


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
    found = [_answer(here) for _, here in ranks]
    for process, _ in ranks:
        process.join()
    problem = next((f.problem for f in found if f.problem), "")
    if problem:
        return Found([], 0, 0, problem)
    slowest = [max(times) for times in zip(*(f.seconds for f in found), strict=True)]
    return Found(slowest, max(f.peak for f in found), statistics.mean(f.loss for f in found))


def _answer(connection: Any) -> Found:
    try:
        return connection.recv()
    except EOFError:
        return Found([], 0, 0, "died, see above; of too little memory, if there is nothing above")


def free_bytes(device: str) -> float:
    """Memory that may still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def compare(case: Case, rounds: int, sides: list[Side]) -> None:
    """All sides in turn, so that what else the machine does meets each; a line each, and the ratios."""
    name = f"{case.loss} B {case.batch:6d} ranks {case.world}"
    # Each rank holds a share of the pairs; on one machine the shares add up.
    needed = THEIR_BYTES_PER_PAIR * case.batch**2
    if "peer" in sides and needed > free_bytes(case.device):
        print(f"{name} peer left out: its {needed / 1e9:.1f} GB are not free", flush=True)
        sides = [side for side in sides if side != "peer"]
    found: dict[str, list[Found]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            if not any(f.problem for f in found[side]):
                found[side].append(run(case._replace(side=side)))
    for side, runs in list(found.items()):
        if runs[-1].problem:
            print(f"{name} {side} {runs.pop().problem}", flush=True)
            del found[side]
            continue
        seconds = _seconds(runs)
        rate = f", {8 * WIDTH * case.batch**2 / statistics.median(seconds) / 1e12:.2f} TFLOP/s" * (side == "bound")
        print(
            f"{name} {side:8s}: {statistics.median(seconds):9.4f} s (spread "
            f"{max(seconds) - min(seconds):.4f}), peak {_megabytes(runs):9.1f} MB per rank{rate}"
            + f", loss {runs[0].loss:.6f}"
            * (side != "bound"),
            flush=True,
        )
    _ratios(name, found)


def _seconds(runs: list[Found]) -> list[float]:
    return [seconds for f in runs for seconds in f.seconds]


def _megabytes(runs: list[Found]) -> float:
    return statistics.median(f.peak for f in runs) / 1e6


def _ratios(name: str, found: dict[str, list[Found]]) -> None:
    """Ours by the others."""
    for own in [side for side in OURS if side in found]:
        for other in [side for side in ("peer", "bound") if side in found]:
            pairs = zip(_seconds(found[own]), _seconds(found[other]), strict=True)
            line = f"{name} {own}: time {statistics.median(a / b for a, b in pairs):.2f} of the {other}'s"
            if other == "peer":
                line += f", memory {_megabytes(found[other]) / _megabytes(found[own]):.1f} times less"
            print(line, flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["softmax"], choices=["softmax", "sigmoid"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kernels", nargs="+", default=["plain"], choices=OURS, help="of ours; compiled: on cuda only")
    parser.add_argument("--precision", default="highest", choices=["highest", "high"], help="high: with TF32")
    parser.add_argument("--tile", type=int, help="rows and columns of a tile; left out: the library's")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    peer = "open_clip" if OPEN_CLIP else "a transcription of open_clip's losses"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads} thread(s) a rank"
    print(
        f"{device}, torch {torch.__version__}, peer: {peer}, median of {args.rounds}, D = {WIDTH}, fp32 with matrix "
        f"products in {args.precision!r} precision ({'no ' * (args.precision == 'highest')}TF32), tiles of "
        f"{args.tile or contrastive.TILES[args.device]}",
        flush=True,
    )
    for loss in args.losses:
        for world in args.ranks:
            if world > 1 and not OPEN_CLIP:
                raise SystemExit("over ranks the peer is open_clip itself: pip install open_clip_torch")
            for batch in args.batches:
                sides = [*args.kernels, "peer"] + ["bound"] * (world == 1)
                repeats = cuda * args.rounds
                case = Case("peer", loss, batch, world, args.device, args.threads, repeats, args.precision, args.tile)
                compare(case, 1 if cuda else args.rounds, sides)


if __name__ == "__main__":
    main()
