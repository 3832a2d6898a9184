"""Each pretext's step against its encoder's bare forward and backward on the same crops, in one table.

Of a step is noted what trained encoders are given (views, tiles, turned copies); the bare pass is those encoders on the
same numbers, with a loss that costs nothing. So the ratio tells what a method adds: augmentation, head, decoder, loss,
and the passes of teachers, which are not trained. Rounds alternate. No optimizer, fp32, one thread.
Run: ``python -m tests.perf.pretexts [--only rotation jigsaw] [--batch 16] [--rounds 5] [--processor-time]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core import registry
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, StepContext
from pipeline.nn.encoder import ImageEncoder

SIZE = 96
CTX = StepContext(seed=0, clock=Clock(0, 0, 1000))
ENCODER = {"encoder": "resnet18"}
TILES = {"size": 28, "jitter": 4}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {}),
    "rotation": ("rotation", {}),
    "relative_patch": ("relative_patch", {"tiles": TILES | {"colour": "drop"}, "hidden": 512}),
    "jigsaw": (
        "jigsaw",
        {"tiles": TILES | {"grey": 0.3, "shift": 1, "standardise": True}, "permutations": 100, "tile_dim": 128},
    ),
    "exemplar": ("exemplar", {}),
    "colorization": ("colorization", {"hidden": 64}),
    "colorization, split brain": ("colorization", {"hidden": 64, "split_brain": True}),
    "autoencoder": ("autoencoder", {}),
    "autoencoder, sparse (KL)": ("autoencoder", {"sparsity": "kl"}),
    "autoencoder, denoising": ("autoencoder", {"corruption": {"noise": 0.5, "pixels": 0.3}}),
    "autoencoder, contractive": ("autoencoder", {"contraction": 0.1}),
    "simclr": ("simclr", {}),
    "moco": ("moco", {"queue": 1024}),
    "byol": ("byol", {}),
    "barlow_twins": ("barlow_twins", {}),
    "vicreg": ("vicreg", {}),
    "dino": ("dino", {"prototypes": 4096}),
    "swav": ("swav", {}),
    "deep_cluster": ("deep_cluster", {"clusters": 100, "components": 64}),
    "daic": ("daic", {}),
}
"""Objective and settings, beside the encoder. Those that the folder has not got are passed over."""


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.processor_time else time.perf_counter
    print(
        "| method | images of a sample | encoder alone, ms | step, ms | step / encoder |\n|---|---|---|---|---|",
        flush=True,
    )
    for row in args.only:
        name, settings = ROWS[row]
        if name not in registry.names("pipeline.objectives"):
            print(f"| {row} | | | | not there |")
            continue
        crops, alone, whole = measured(name, settings, args.batch, args.rounds, clock)
        ratios = sorted(step / bare for step, bare in zip(whole, alone, strict=True))
        bare, step = (1000 * statistics.median(seconds) for seconds in (alone, whole))
        middle = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {row} | {crops / args.batch:g} | {bare:.0f} | {step:.0f} | {middle} |", flush=True)


def measured(
    name: str, settings: dict[str, Any], batch: int, rounds: int, clock: Callable[[], float]
) -> tuple[int, list[float], list[float]]:
    """Images that trained encoders see in a step, and the seconds of bare passes and of whole steps."""
    torch.manual_seed(0)
    cls = registry.component("pipeline.objectives", name, Objective)
    facts = DataFacts((SIZE, SIZE), tuple("abcdefghij"), samples=1000)
    objective = cls(registry.module("pipeline.objectives", name).Config(**ENCODER | settings), facts).train()
    data = images(objective, batch)
    with seen_by_encoders(objective) as seen:
        objective(data, CTX).loss.backward()
    alone: list[float] = []
    whole: list[float] = []
    for number in range(rounds + 1):
        for seconds, work in ((alone, lambda: bare(seen)), (whole, lambda: objective(data, CTX).loss.backward())):
            objective.zero_grad(set_to_none=True)
            began = clock()
            work()
            if number:  # the first round warms up
                seconds.append(clock() - began)
    return sum(len(x) for _, x in seen), alone, whole


def bare(seen: list[tuple[nn.Module, Tensor]]) -> None:
    """The encoders' forward and backward."""
    for encoder, x in seen:
        out = encoder(x)
        out.backward(torch.ones_like(out))


@contextmanager
def seen_by_encoders(objective: Objective) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """What backbones are given while gradients are kept."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append((module, inputs[0].detach()))

    backbones = {m.backbone for m in objective.modules() if isinstance(m, ImageEncoder)}
    hooks = [
        backbone.register_forward_pre_hook(note)
        for backbone in backbones
        if any(p.requires_grad for p in backbone.parameters())
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def images(objective: Objective, samples: int) -> Batch:
    """A batch of what the objective needs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(samples)
    batch = {"id": ids, "epoch": torch.zeros_like(ids)}
    for field, spec in objective.needs.items():
        dtype, letters = spec.removesuffix("]").split("[")
        sizes = {"B": samples, "H": SIZE, "W": SIZE}
        shape = [sizes[s] if s in sizes else int(s) for s in letters.split(",")]
        high = 256 if dtype == "uint8" else 10
        batch[field] = torch.randint(0, high, shape, generator=generator, dtype=getattr(torch, dtype))
    return batch


if __name__ == "__main__":
    main()
