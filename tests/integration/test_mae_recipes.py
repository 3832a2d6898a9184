"""The shipped recipes: each passes `sluice check` on a data set of its size, with the rates that were published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.manifest import FILE, Manifest, Shard
from pipeline.core.protocols import DataFacts
from pipeline.nn.encoder import EncoderConfig
from pipeline.objectives import mae, supervised

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = (1_281_167, 1000)
# recipe: ranks, accumulation, peak rate = published base rate x batch / 256, steps, millions of parameters
RECIPES = {
    "pretrain/mae_vit_b_800": (64, 1, 1.5e-4 * 16, 800 * 312, 112),
    "pretrain/mae_vit_b_1600": (32, 2, 1.5e-4 * 16, 1600 * 312, 112),
    "pretrain/mae_vit_l_800": (64, 1, 1.5e-4 * 16, 800 * 312, 330),
    "pretrain/mae_vit_l_1600": (64, 1, 1.5e-4 * 16, 1600 * 312, 330),
    "pretrain/mae_vit_h_800": (64, 1, 1.5e-4 * 16, 800 * 312, 657),
    "pretrain/mae_vit_h_1600": (64, 1, 1.5e-4 * 16, 1600 * 312, 657),
    "pretrain/mae_vit_s_imagenette": (1, 1, 1.5e-4, 200 * 36, 48),
    "finetune/mae_vit_b": (32, 1, 5e-4 * 4, 100 * 1251, 87),
    "finetune/mae_vit_l": (32, 1, 1e-3 * 4, 50 * 1251, 304),
    "finetune/mae_vit_h": (32, 1, 1e-3 * 4, 50 * 1251, 632),
    "finetune/mae_vit_b_linear": (32, 1, 6.4, 90 * 78, 87),
    "finetune/mae_vit_l_linear": (32, 1, 6.4, 50 * 78, 304),
    "finetune/mae_vit_h_linear": (8, 4, 6.4, 50 * 78, 632),
}


def data_set(folder: Path, samples: int, classes: int) -> str:
    shards = tuple(Shard(f"train-{i:06}.tar", samples // 128 + (i < samples % 128), 1, "0" * 64) for i in range(128))
    fields = {"image": ("jpg",), "label": ("cls",)}
    manifest = Manifest(str(folder), shards, fields, tuple(f"class {i}" for i in range(classes)))
    (folder / FILE).write_text(manifest.as_json())
    return str(folder)


@pytest.mark.parametrize("suite", sorted(p.stem for p in (CONFIGS / "eval").glob("*.toml")))
def test_a_suite_is_sound(suite, capsys):
    check(CONFIGS / "eval" / f"{suite}.toml", [], 1)
    assert "is sound" in capsys.readouterr().out


def test_no_recipe_is_left_out():
    found = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.glob("*/mae_*.toml")}
    assert {r for r in found if r.startswith(("pretrain/", "finetune/"))} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    ranks, accumulation, peak, steps, millions = RECIPES[recipe]
    samples, classes = (9_469, 10) if "imagenette" in recipe else IMAGENET
    overrides = [f"data.train={data_set(tmp_path, samples, classes)}"]
    path = CONFIGS / f"{recipe}.toml"
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, ranks)
    assert (plan.accumulation, plan.total_steps) == (accumulation, steps)
    assert plan.peak_lr == pytest.approx(peak)
    module, cls = (mae, mae.MAE) if config.objective.name == "mae" else (supervised, supervised.Supervised)
    settings = module.Config(**config.objective.settings)
    assert isinstance(settings, EncoderConfig)
    facts = DataFacts(config.data.image.shape, tuple(f"class {i}" for i in range(classes)))
    with torch.device("meta"):
        objective = cls(settings.model_copy(update={"weights": None}), facts)
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    if recipe.endswith("_linear"):
        trained = [name for name, p in objective.named_parameters() if p.requires_grad]
        assert trained == ["head.weight", "head.bias"] and plan.schedule.final == 0
        assert config.optimizer.name == "lars" and config.optimizer.weight_decay == 0
    elif recipe.startswith("finetune/"):
        assert plan.peak_lr * plan.schedule.final == pytest.approx(1e-6, rel=0.01)
        blocks = len(objective.encoder.backbone.blocks)
        assert len(objective.layers()) == blocks + 1
