"""What tests of adaptation share: small objectives, batches of two data sets, facts of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.core import registry
from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, SetFacts, StepContext

CLASSES = ("a", "b", "c", "d")
SIZE = (16, 16)
CTX = StepContext(seed=1, clock=Clock(step=5, samples=50, total_samples=100))
"""In the middle of a run."""
NET: dict[str, Any] = {
    "encoder": "resnet18",
    "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "zero_init_last": False},
}
VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}


def at(progress: float, **more: Any) -> StepContext:
    """A moment of the run."""
    return replace(CTX, clock=Clock(round(progress * 10), round(progress * 100), 100), **more)


def facts(**beside: SetFacts) -> DataFacts:
    """Two sources of unlike domains, whose samples begin at 0 and at 3, and a target."""
    sets = {"target": SetFacts(50, CLASSES, ("ink",), 100, ((100, 0),))} | beside
    return DataFacts(SIZE, CLASSES, 100, ("one", "two"), sets, sources=((0, 0), (3, 1)))


def build(name: str, known: DataFacts | None = None, **settings: Any) -> Any:
    """An objective, in training, with the same weights at each call."""
    module = registry.module("pipeline.objectives", name)
    torch.manual_seed(0)
    cls = registry.component("pipeline.objectives", name, Objective)
    return cls(module.Config(**settings), known or facts()).train()  # pyright: ignore[reportCallIssue]


def images(samples: int, seed: int) -> Tensor:
    """uint8[B,3,H,W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (samples, 3, *SIZE), dtype=torch.uint8, generator=generator)


def batch(samples: int = 6, **more: Tensor) -> Batch:
    """Labels 0, 1, 2, 3, 0, ...; the first three samples are of the first source."""
    ids = torch.arange(samples)
    own = {"id": ids, "epoch": torch.zeros_like(ids), "image": images(samples, 0), "label": ids % len(CLASSES)}
    target = {"target_id": ids + 100, "target_epoch": torch.zeros_like(ids), "target_image": images(samples, 1)}
    return own | target | more


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters that the loss reaches."""
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


LABELS = batch()["label"]
"""Of that batch."""


def seen(objective: Any, whole: Batch) -> list[tuple[Tensor, Tensor]]:
    """Features and logits of source and target; nothing of them may depend on the batch's company."""
    parts = [batch_of(whole, name) for name in ("", "target")]
    return [objective.seen(part["image"], part, CTX) for part in parts]
