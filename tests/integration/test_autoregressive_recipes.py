"""Recipes of autoregressive models and of diffusion on latents: sound, and of the published size."""

from __future__ import annotations

import pytest
import torch

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core import registry
from pipeline.core.protocols import DataFacts, Objective
from tests.integration.test_mae_recipes import CONFIGS, IMAGENET, data_set

CIFAR10 = (50_000, 10)
# recipe: data, ranks, updates, millions of trained parameters, and of those that come from a file
RECIPES = {
    "pixelcnn_cifar10": (CIFAR10, 8, 5000 * 390, 53.6, 0.0),
    "vq_vae_imagenet128": (IMAGENET, 8, 250_000, 13.6, 0.0),
    "vq_vae_prior_imagenet128": (IMAGENET, 8, 300_000, 87.4, 13.6),
    "ldm_imagenet256": (IMAGENET, 8, 400_000, 258.8, 83.7),
    "dit_imagenet256": (IMAGENET, 8, 400_000, 674.8, 83.7),
    "repa_imagenet256": (IMAGENET, 8, 400_000, 683.0, 83.7 + 85.7),
}
STAGES = {"vq_vae_imagenet128"}
"""What comes first, of an objective that has recipes of its own."""


def test_no_recipe_is_left_out():
    names = ('name = "autoregressive"', 'name = "ddpm"', "latent_imagenet256")
    published = [p for kind in ("cifar10", "imagenet*") for p in (CONFIGS / "generative").glob(f"*_{kind}.toml")]
    found = {p.stem for p in published if any(name in p.read_text() for name in names)}
    assert found == set(RECIPES) - STAGES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    data, ranks, updates, trained, given = RECIPES[recipe]
    overrides = [f"data.train={data_set(tmp_path, *data)}"]
    path = CONFIGS / "generative" / f"{recipe}.toml"
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, data[0], ranks)
    assert (plan.accumulation, plan.total_steps) == (1, updates)
    known = DataFacts(config.data.image.shape, tuple(f"class {i}" for i in range(data[1])))
    name = config.objective.name
    component = registry.component("pipeline.objectives", name, Objective)
    settings = registry.module("pipeline.objectives", name).Config(**config.objective.settings)
    with torch.device("meta"):
        objective = component(settings, known)
    for wanted, millions in ((True, trained), (False, given)):
        count = sum(p.numel() for p in objective.parameters() if p.requires_grad == wanted)
        assert count / 1e6 == pytest.approx(millions, abs=0.1)
