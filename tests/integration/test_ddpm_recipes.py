"""The diffusion recipes: sound, of the published size, and updates and batch as published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_run
from pipeline.core.components import check_run
from pipeline.core.protocols import DataFacts
from pipeline.objectives.ddpm import DDPM, Config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {
    # millions of parameters, classes, updates, global batch
    "pretrain/ddpm_cifar10": (35.7, 0, 800_000, 128),
    "pretrain/iddpm_imagenet64": (273, 1000, 250_000, 2048),
    "pretrain/adm_imagenet64": (296, 1000, 540_000, 2048),
    "pretrain/edm_cifar10": (57.4, 10, 200_000_000 // 512 + 1, 512),
    "pretrain/dit_imagenet64": (130, 1000, 400_000, 256),
    "demo/ddpm_glyphs": (1.19, 12, 1500, 32),
}


def test_no_recipe_is_left_out():
    found = {p for p in CONFIGS.glob("*/*.toml") if 'name = "ddpm"' in p.read_text() or "base/ddpm" in p.read_text()}
    named = {str(p.relative_to(CONFIGS).with_suffix("")) for p in found}
    assert {n for n in named if n.startswith(("pretrain/", "demo/"))} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe):
    millions, classes, updates, batch = RECIPES[recipe]
    path = CONFIGS / f"{recipe}.toml"
    config = load_run(path, [])
    check_run(config, str(path))
    with torch.device("meta"):
        facts = DataFacts(config.data.image.shape, tuple(f"class {i}" for i in range(classes)))
        model = DDPM(Config(**config.objective.settings), facts)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert config.run.global_batch == batch and config.ema is not None
    length = config.run.length
    assert (length.value if length.unit == "ba" else -(-length.value // batch)) in (updates, updates - 1)
