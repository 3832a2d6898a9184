"""What the tests of methods with two views share: small models, batches, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.core import registry
from pipeline.core.protocols import Batch, Clock, DataFacts, Embeddings, StepContext
from pipeline.nn.two_views import TwoViewObjective

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "zero_init_last": False}
GLOBAL = 8


def build(name: str, **settings: Any) -> TwoViewObjective:
    torch.manual_seed(0)
    module = registry.module("pipeline.objectives", name)
    defaults = {"encoder": "resnet18", "encoder_args": RESNET, "small_stem": True, "hidden": 12, "dim": 6}
    cls = registry.component("pipeline.objectives", name, TwoViewObjective)
    return cls(module.Config(**defaults | settings), DataFacts((16, 16), ())).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, GLOBAL, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = torch.arange(GLOBAL)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images[0], "image2": images[1]}


def rows(samples: int = 10, width: int = 6) -> tuple[Tensor, Tensor, Embeddings]:
    """Embeddings in which features are correlated, of unequal spread, and far from zero."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(samples, width, generator=generator) @ torch.randn(width, width, generator=generator) * 0.3 + 5
    second = first + 0.2 * torch.randn(samples, width, generator=generator)
    parts = {"embedding": first.clone().requires_grad_(), "embedding2": second.clone().requires_grad_()}
    return first.double(), second.double(), Embeddings(parts | {"features": first}, {})
