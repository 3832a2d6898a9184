"""The recipes of adversaries and energies: each passes `sluice check` on data of its size, and is as published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core import registry
from pipeline.core.protocols import DataFacts, Objective
from tests.integration.test_contrastive_recipes import CIFAR, IMAGENET, data_set

CONFIGS = Path(__file__).parents[2] / "configs" / "generative"
# recipe: samples, ranks, batch of a rank, peak rate, steps, millions of parameters
RECIPES = {
    "sngan_cifar10": (CIFAR, 1, 320, 2e-4, 100_000, 4.277 + 1.054),
    "wgan_gp_cifar10": (CIFAR, 1, 320, 2e-4, 100_000, 1.204 + 1.054),
    "vqgan_imagenet_f16": (IMAGENET, 8, 12, 4.5e-6 * 96, 500_000, 66.883 + 2.766),
    "srgan_imagenet": (IMAGENET, 1, 16, 1e-4, 1_200_000, 1.518 + 3.001),
    "ncsn_cifar10": (CIFAR, 1, 128, 2e-4, 200_000, 35.7),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, ranks, share, peak, steps, millions = RECIPES[recipe]
    path, overrides = CONFIGS / f"{recipe}.toml", [f"data.train={data_set(tmp_path, samples)}"]
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, ranks)
    assert plan.micro_batch == share and plan.accumulation == 1 and plan.total_steps == steps
    assert plan.peak_lr == pytest.approx(peak)
    name = config.objective.name
    settings = registry.module("pipeline.objectives", name).Config(**config.objective.settings)
    with torch.device("meta"):
        facts = DataFacts(config.data.image.shape, (), samples=samples)
        objective = registry.component("pipeline.objectives", name, Objective)(settings, facts)
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert set(config.phases) <= set(objective.phases())
