"""The part of a plan that needs the model: its sizes, and what a forward keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.run import cost
from pipeline.run.cost import activations, kept_for_backward, sizes_of
from tests.contracts.components import build_objective, make_batch


class Toy(nn.Module):
    """Keeps two tensors of eight numbers per sample: the layer's output and what GELU makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def phases(self) -> dict[str, list[str]]:
        return {}

    def forward(self, batch: dict[str, Tensor], ctx: object) -> Tensor:
        return nn.functional.gelu(self.layer(batch["x"])).pow(2).sum()


def batch_of(samples: int) -> dict[str, Tensor]:
    return {"x": torch.ones(samples, 4)}


def test_parameters_and_the_batch_itself_are_not_counted_among_what_a_forward_keeps():
    assert kept_for_backward(cast(Any, Toy()), batch_of(3), "fp32") == 2 * 3 * 8 * 4


def test_activations_grow_with_the_micro_batch(monkeypatch):
    monkeypatch.setattr(cost, "sample_batch", lambda config, manifest, samples: batch_of(samples))
    for samples in (1, 2, 64):
        config = SimpleNamespace(engine=SimpleNamespace(micro_batch=samples, precision="fp32"))
        assert activations(cast(Any, config), cast(Any, Toy()), cast(Any, None)) == 2 * samples * 8 * 4


class Own(nn.Linear):
    """Autocast does not know it by its class."""


def test_sizes_of_a_model():
    frozen = nn.Linear(5, 5).requires_grad_(False)
    model = nn.ModuleList([nn.Linear(4, 8), nn.Conv2d(2, 3, 1), Own(2, 2), nn.BatchNorm1d(8), frozen])
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    found = sizes_of(model)
    assert sorted(found.trained) == sorted([32, 8, 6, 3, 4, 2, 8, 8])
    assert sorted(found.frozen) == [5, 25]
    assert found.halved == 32 + 8 + 6 + 3
    assert found.buffers == 8 * 4 + 8 * 4 + 8  # mean, variance, and a counter of 64 bits


def test_of_phases_the_one_that_keeps_most_counts(monkeypatch):
    objective = build_objective("toy_gan")
    batch = make_batch(objective, "toy_gan")
    # An activation of each layer, and images: the critic's loss sees both kinds and so keeps more.
    everything = cost.kept_for_backward(objective, batch, "fp32")
    monkeypatch.setattr(objective, "phases", lambda: {"generator": ["generator."]})
    assert 0 < cost.kept_for_backward(objective, batch, "fp32") < everything
