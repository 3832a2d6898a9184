"""Adaptation: the discrepancy by tiles against whole matrices, and a step of two data sets against two bare ones.

The discrepancy: 4,096 samples of each domain, 256 features, five kernels, fp32, loss and gradient, each side in a
process of its own, whose peak memory above the inputs counts. The plain side is the matrix of all samples against all,
as the authors' library computes it, with autograd. The step: `adapt_coral` on a small ResNet, 64 + 64 images of 32
pixels, forward and backward, against forward and backward of cross-entropy on the source and of the same encoder on the
target.

Run: ``python -m tests.perf.adaptation [--rounds 5] [--threads 1] [--processor-time]``
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.protocols import Clock, DataFacts, SetFacts, StepContext
from pipeline.nn.adaptation.mmd import BANDWIDTHS, mmd
from pipeline.objectives.adapt_coral import AdaptCORAL, Config

SAMPLES, WIDTH, IMAGES = 4096, 256, 64


def plain(source: Tensor, target: Tensor) -> Tensor:
    """The unbiased MMD from one matrix of all pairs."""
    both, n = torch.cat([source, target]), len(source)
    distances = torch.cdist(both, both).square()
    sigma = distances.detach().mean()
    kernels = torch.stack([(-distances / (2 * b * sigma)).exp() for b in BANDWIDTHS]).sum(0)
    same, cross = 1 / (n * (n - 1)), -1 / n**2
    weights = kernels.new_full((2 * n, 2 * n), cross)
    weights[:n, :n] = weights[n:, n:] = same
    return (kernels * weights.fill_diagonal_(0)).sum()


SIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": mmd, "plain": plain}


def measure(side: str, threads: int, rounds: int, processor: bool, answer: Any) -> None:
    """Seconds of each round, peak bytes above the inputs, and the value."""
    clock = time.process_time if processor else time.perf_counter
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    source, target = (x.requires_grad_() for x in torch.randn(2, SAMPLES, WIDTH, generator=generator))
    SIDES[side](source[:64], target[:64]).backward()
    before, seconds, value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0.0
    for _ in range(rounds):
        source.grad = target.grad = None
        began = clock()
        loss = SIDES[side](source, target)
        loss.backward()
        seconds.append(clock() - began)
        value = loss.item()
    answer.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, value))


def discrepancy(threads: int, rounds: int, processor: bool) -> None:
    """Both sides, each in a process of its own, and their ratio."""
    found: dict[str, tuple[list[float], float, float]] = {}
    for side in SIDES:
        here, there = mp.get_context("spawn").Pipe()
        process = mp.get_context("spawn").Process(target=measure, args=(side, threads, rounds, processor, there))
        process.start()
        found[side] = here.recv()
        process.join()
        seconds, peak, value = found[side]
        print(
            f"mmd {side:5s}: {statistics.median(seconds):.3f} s, peak {peak / 1e6:.1f} MB, value {value:.6f}",
            flush=True,
        )
    ratio = statistics.median(found["ours"][0]) / statistics.median(found["plain"][0])
    print(f"mmd: time {ratio:.2f} of the plain one's, bound 1.2; memory {found['ours'][1] / 1e6:.1f} MB, bound 100")


def step(rounds: int, processor: bool) -> None:
    """A step of adaptation against its two bare halves, in turns."""
    clock = time.process_time if processor else time.perf_counter
    classes = tuple(map(str, range(10)))
    facts = DataFacts((32, 32), classes, beside={"target": SetFacts(IMAGES, classes, first=IMAGES)})
    args = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}
    objective = AdaptCORAL(Config(encoder="resnet18", encoder_args=args, batch_norm="domain"), facts).train()
    ids, generator = torch.arange(IMAGES), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = {"id": ids, "epoch": ids * 0, "image": images[0], "label": ids % 10}
    batch |= {"target_id": ids + IMAGES, "target_epoch": ids * 0, "target_image": images[1]}
    ctx = StepContext(0, Clock(1, 1, 10))

    def whole() -> None:
        objective(batch, ctx).loss.backward()

    def bare() -> None:
        logits = objective.head(objective.encoder(images[0]))
        functional.cross_entropy(logits, batch["label"]).backward()
        objective.head(objective.encoder(images[1])).square().mean().backward()

    ratios: list[float] = []
    for number in range(rounds + 1):
        seconds = []
        for work in (whole, bare):
            began = clock()
            for _ in range(5):
                work()
            seconds.append(clock() - began)
        if number:
            ratios.append(seconds[0] / seconds[1])
    print(f"step of two data sets: {statistics.median(ratios):.3f} of two bare ones, bound 1.1")


def main() -> None:
    """Print what both cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    discrepancy(args.threads, args.rounds, args.processor_time)
    step(2 * args.rounds, args.processor_time)


if __name__ == "__main__":
    main()
