"""What the tests of pseudo-labels, mean teacher and FixMatch share: small models, and batches of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core import registry
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, StepContext

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
RESNET = {"encoder": "resnet18", "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
KNOWN, RATIO = 3, 2


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = registry.module("pipeline.objectives", name)
    settings = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "head_std": 1.0} | settings
    cls = registry.component("pipeline.objectives", name, Objective)
    return cls(module.Config(**settings), DataFacts((16, 16), tuple("abcd")))


def batch(views: int = 1, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> Tensor:
        return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8, generator=generator)

    ids, others = torch.arange(KNOWN), 100 + torch.arange(KNOWN * RATIO).view(KNOWN, RATIO)
    found = {"image": images(KNOWN), "label": torch.tensor([2, 0, 1]), "id": ids, "epoch": torch.zeros_like(ids)}
    found |= {"unlabelled_id": others, "unlabelled_epoch": torch.zeros_like(others)}
    for view in range(views):
        found[f"unlabelled_image{view + 1 if view else ''}"] = images(KNOWN, RATIO)
    return found


def at(step: int, steps: int = 100) -> StepContext:
    return StepContext(seed=1, clock=Clock(step, 8 * step, 8 * steps))


def logits(model: Any, image: Tensor) -> Tensor:
    return model.head(model.encoder(image))


def between(model: Any, data: Batch, taught: int) -> float:
    """A threshold that so many of the unlabelled images of a batch reach."""
    with torch.no_grad():
        sure = logits(model, data["unlabelled_image"].flatten(0, 1)).softmax(dim=1).amax(dim=1)
    edges = [0.0, *sure.sort().values.tolist()]
    return (edges[6 - taught] + edges[7 - taught]) / 2


def check_common(name: str) -> None:
    """Labelled and unlabelled images share one forward, as the authors have it; labels of the latter are not asked for;
    mistakes are named."""
    model, data = build(name, **RESNET).train(), batch(views=2)
    model(data, at(3))
    assert int(model.encoder.backbone.bn1.num_batches_tracked) == 1
    assert "unlabelled_label" not in model.needs
    with pytest.raises(ConfigError, match=r"no data set 'unlabelled'.*data.beside.unlabelled"):
        model({key: value for key, value in data.items() if not key.startswith("unlabelled")}, at(0))
    with pytest.raises(DataError, match="labels run from 0 to 9"):
        build(name)(data | {"label": torch.tensor([0, 9, 1])}, at(0))
