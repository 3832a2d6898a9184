"""MAE ViT-B/16 at 224: the whole loop against a plain transcription of the authors' model, same weights, same images.

The peer is ``tests/parity/plain_mae.py`` (explicit attention, fp32) under torch's AdamW in a bare loop. Ours is the
loop with meter, metrics and engine, in bf16 as the recipes have it. Rounds alternate, so that a machine that slows down
slows down both. Run: ``python -m tests.perf.mae_step [--batch 8] [--steps 3] [--rounds 3] [--precision fp32]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.resolve import Plan
from pipeline.config.schedules import constant
from pipeline.config.schema import EngineConfig, Optimizer
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.dist.group import Place, process_group
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.loop import fit
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.watch import Watch
from pipeline.objectives.mae import MAE, Config
from tests.parity import plain_mae

SIZE = (224, 224)
LR = 1e-5


class Memory:
    """A stream of one batch that is already there."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, step: int) -> Iterator[list[Batch]]:
        while True:
            yield [self.batch]


def images(batch: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, generator=generator)
    return {"image": image, "id": torch.arange(batch), "epoch": torch.zeros(batch, dtype=torch.int64)}


def fresh(config: Config) -> MAE:
    torch.manual_seed(0)
    return MAE(config, DataFacts(SIZE, ()))


def ours(mae: Config, precision: Literal["bf16", "fp32"], batch: Batch, place: Place) -> Callable[[int], float]:
    """Seconds of so many steps of the loop."""
    n = len(batch["id"])
    plan = Plan(n, n, 1, n, 1, 1.0, 10**6, 10**6 * n, 0, 0, constant.Config(), LR, {}, 0, 0, 0, {})
    config = EngineConfig(name="accelerate", precision=precision, micro_batch=n)
    engine = AccelerateEngine(fresh(mae).train(), config, Optimizer(lr=LR), plan, place)
    meter = Meter(place.device, 1)

    def run(steps: int) -> float:
        began = time.perf_counter()
        fit(
            engine=engine,
            stream=Memory(batch),
            clock=Clock(0, 0, steps * n),
            global_batch=n,
            seed=0,
            learning_rate=lambda samples, phase: LR,
            actions=(),
            meter=meter,
            watch=Watch(place.device, StopRequest(Path("/nonexistent"))),
        )
        return time.perf_counter() - began

    return run


def plain(mae: Config, batch: Batch) -> Callable[[int], float]:
    """Seconds of so many steps of a bare loop over the transcription."""
    model = fresh(mae)
    weights = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    keep, hidden = model.masks(batch, StepContext(0, Clock(0, 0, 1)))
    noise = torch.empty(len(keep), model.geometry.patches)
    noise.scatter_(1, torch.cat([keep, hidden], 1), torch.arange(float(noise.shape[1])).expand_as(noise))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.mean, model.config.std))
    heads = (model.encoder.blocks[0].attn.num_heads, model.config.decoder_heads)

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            x = (batch["image"] / 255 - mean) / std
            patch = model.geometry.patch[0]
            plain_mae.loss(weights, x, noise, patch=patch, keep=model.visible, heads=heads).backward()
            optimizer.step()
        return time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    batch, mae = images(args.batch), Config(encoder=args.encoder)
    with process_group(5.0) as place:
        contenders = {
            "plain fp32": plain(mae, batch),
            f"loop {args.precision}": ours(mae, args.precision, batch, place),
        }
        for run in contenders.values():
            run(1)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, run in contenders.items():
                began = clock()
                run(args.steps)
                seconds[name].append(clock() - began)
    rates = {name: [args.batch * args.steps / s for s in values] for name, values in seconds.items()}
    base = statistics.median(rates["plain fp32"])
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name}: {middle:.2f} images/s ({min(values):.2f} to {max(values):.2f}), {middle / base:.2f} x plain")


if __name__ == "__main__":
    main()
