"""The recipes of methods without negatives: each passes `sluice check` on data of its size, and is of its size."""

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

CONFIGS = Path(__file__).parents[2] / "configs"
# recipe: samples, ranks, batch of a rank, peak rate, epochs, millions of parameters: ResNet-50 has 23.508, ViT-S/16
# 21.666; the followers count, too. BYOL's heads have 9.445 and 2.105, the others' projectors 151.0, DINO's head 22.35.
RECIPES = {
    "byol_rn50_300": (IMAGENET, 32, 128, 0.3 * 16, 300, 2 * (23.508 + 9.445) + 2.105),
    "byol_rn50_1000": (IMAGENET, 32, 128, 0.2 * 16, 1000, 2 * (23.508 + 9.445) + 2.105),
    "byol_rn18_cifar10": (CIFAR, 1, 128, 0.015, 200, 2 * (11.169 + 0.789) + 0.526),
    "barlow_twins_rn50_1000": (IMAGENET, 32, 64, 0.2 * 8, 1000, 23.508 + 151.03),
    "barlow_twins_rn18_cifar10": (CIFAR, 1, 128, 0.06, 200, 11.169 + 5.247),
    "vicreg_rn50_1000": (IMAGENET, 32, 64, 0.2 * 8, 1000, 23.508 + 151.03),
    "dino_vit_s_100": (IMAGENET, 8, 64, 5e-4 * 2, 100, 2 * (21.666 + 22.352)),
    "dino_vit_s_300": (IMAGENET, 16, 64, 5e-4 * 4, 300, 2 * (21.666 + 22.352)),
    "ibot_vit_s_800": (IMAGENET, 16, 64, 5e-4 * 4, 800, 2 * (21.666 + 7.614)),
    "ijepa_vit_h_300": (IMAGENET, 16, 128, 1e-3, 300, 2 * 630.4 + 22.3),
}


def test_no_recipe_is_left_out():
    kinds = ("byol", "barlow", "vicreg", "dino", "ibot", "ijepa")
    assert {p.stem for p in (CONFIGS / "pretrain").glob("*.toml") if p.stem.startswith(kinds)} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, ranks, share, peak, epochs, millions = RECIPES[recipe]
    path, overrides = CONFIGS / "pretrain" / f"{recipe}.toml", [f"data.train={data_set(tmp_path, samples)}"]
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, ranks)
    steps = epochs * (samples // config.run.global_batch)
    assert plan.micro_batch == share and plan.accumulation == 1 and steps <= plan.total_steps <= steps + 1
    assert plan.peak_lr == pytest.approx(peak)
    name = config.objective.name
    settings = registry.module("pipeline.objectives", name).Config(**config.objective.settings)
    views = tuple(view.shape for view in config.data.image.each)
    with torch.device("meta"):
        facts = DataFacts(config.data.image.shape, (), samples=samples, views=views)
        objective = registry.component("pipeline.objectives", name, Objective)(settings, facts)
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    names = [n for n, _ in objective.named_parameters()]
    assert all(any(n.startswith(group.prefix) for n in names) for group in config.optimizer.groups)
