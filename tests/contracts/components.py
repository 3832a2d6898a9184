"""What the contract tests share: components built from their smoke configs, batches made from what they need."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.core import registry
from pipeline.core.protocols import Batch, Clock, DataFacts, Evaluation, Objective, StepContext

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
CLASSES = tuple(f"class {i}" for i in range(7))
CONTEXT = StepContext(seed=3, clock=Clock(step=2, samples=16, total_samples=64))


def smoke_config(name: str) -> RunConfig:
    """The smoke config of an objective."""
    return RunConfig.model_validate(tomllib.loads((SMOKE / f"{name}.toml").read_text()))


def facts(config: RunConfig) -> DataFacts:
    """Of a data set that would fit the config."""
    return DataFacts(config.data.image.shape, CLASSES)


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective of a smoke config, with weights that depend on nothing but the config."""
    config = smoke_config(name)
    module = registry.module("pipeline.objectives", name)
    cls = registry.component("pipeline.objectives", name, Objective)
    torch.manual_seed(0)
    return cls(module.Config(**config.objective.settings | settings), facts(config))


def stir(objective: Objective) -> Objective:
    """Move matrices that begin at zero (last layers of blocks), so that they hide no gradient; returns the same."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return objective


def build_evaluation(name: str, **settings: Any) -> Evaluation:
    """An evaluation with its defaults, but for ``settings``."""
    module = registry.module("pipeline.evals", name)
    return registry.component("pipeline.evals", name, Evaluation)(module.Config(**settings))


def make_batch(objective: Objective, name: str, samples: int = 8) -> Batch:
    """A random batch that has what the objective needs."""
    generator = torch.Generator().manual_seed(1)
    height, width = smoke_config(name).data.image.shape
    batch = {"id": torch.arange(100, 100 + samples), "epoch": torch.full((samples,), 2)}
    for field, spec in objective.needs.items():
        dtype, letters = spec.removesuffix("]").split("[")
        sizes = {"B": samples, "H": height, "W": width}
        shape = [sizes[s] if s in sizes else int(s) for s in letters.split(",")]
        high = 256 if dtype == "uint8" else len(CLASSES)
        low = int(field.endswith("_length"))  # no text is without a token
        batch[field] = torch.randint(low, high, shape, generator=generator, dtype=getattr(torch, dtype))
    if "text" in batch:  # every text ends with the token that ends texts
        batch["text"].scatter_(1, batch["text_length"][:, None] - 1, 2)
    return batch


class ListStream:
    """An EvalStream over tensors in memory, shared out over ranks in turn; batches of uneven size.

    A sample's text is the name of its class, in one token, before padding.
    """

    def __init__(self, image: Tensor, label: Tensor, rank: int = 0, world: int = 1, batch: int = 5) -> None:
        self.image, self.label, self.samples = image, label, len(image)
        self.classes = tuple(f"class {i}" for i in range(int(label.max()) + 1))
        self.mine = torch.arange(len(image))[rank::world].split(batch)

    def __iter__(self) -> Iterator[Batch]:
        for ids in self.mine:
            yield {
                "image": self.image[ids],
                "label": self.label[ids],
                **self.tokens([self.classes[i] for i in self.label[ids]]),
                "id": ids,
                "epoch": torch.zeros_like(ids),
            }

    def tokens(self, texts: Sequence[str]) -> Batch:
        rows = [[int(text.removesuffix(".").rpartition(" ")[2]), 99] for text in texts]
        return {"text": torch.tensor(rows), "text_length": torch.ones(len(rows), dtype=torch.int64)}
