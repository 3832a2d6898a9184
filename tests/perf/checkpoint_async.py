"""How long saving keeps training from going on: the background save against the same save waited for, and torch.save.

ViT-B/16 with AdamW's state (86 M parameters, 1.03 GB), one process. The three alternate; the first round, in which the
memory for the copy is made, is shown on its own. Files of both kinds of save are compared by their hashes.
Run: ``python -m tests.perf.checkpoint_async [--rounds 3] [--model vit_base_patch16_224] [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from pipeline.dist.group import process_group
from pipeline.engine.checkpoint import CheckpointStore, read_manifest
from pipeline.engine.fragments import Fragment, Slot, trained
from pipeline.engine.saving import Saver


def state(model: str) -> tuple[list[Fragment], int]:
    """A model's parameters and optimizer state after one step, and their bytes."""
    module = timm.create_model(model, num_classes=0)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    slots = [Slot(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in module.named_parameters()]
    fragments = list(trained(slots, optimizer, writing=True))
    return fragments, sum(f.data.nbytes for f in fragments)


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain(fragments: list[Fragment], path: Path) -> None:
    """What most loops do: torch.save, made durable."""
    with open(path, "wb") as file:
        torch.save({f"{f.name}@{f.start}": f.data for f in fragments}, file)
        file.flush()
        os.fsync(file.fileno())


def hashes(saver: Saver, step: int) -> list[str]:
    """Of a checkpoint's files."""
    return [facts["sha256"] for facts in read_manifest(saver.store.path(step)).files.values()]


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    fragments, size = state(args.model)
    blocked: list[float] = []
    waited: list[float] = []
    torchs: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, process_group(60) as place:
        saver = Saver(CheckpointStore(Path(folder), place, print), 2, lambda step: None)
        for step in range(0, 2 * (args.rounds + 1), 2):
            blocked.append(seconds(lambda s=step: saver.save(s, fragments, {})))
            saver.finish()
            waited.append(seconds(lambda s=step: (saver.save(s + 1, fragments, {}), saver.finish())))
            assert hashes(saver, step) == hashes(saver, step + 1), "the two saves differ"
            torchs.append(seconds(lambda: plain(fragments, Path(folder) / "plain")))
    print(f"{size / 1e9:.2f} GB; first save blocks {blocked[0]:.3f} s (its memory is made); {args.rounds} more rounds:")
    for name, values in (("blocking", blocked), ("waited for", waited), ("torch.save and fsync", torchs)):
        print(f"{name:>20}: {statistics.median(values[1:]):.3f} s ({min(values[1:]):.3f} to {max(values[1:]):.3f})")
    for name, values in (("waited for", waited), ("torch.save", torchs)):
        ratios = [b / v for b, v in zip(blocked[1:], values[1:], strict=True)]
        print(f"blocking / {name}: {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})")


if __name__ == "__main__":
    main()
