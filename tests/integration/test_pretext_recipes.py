"""The recipes of pretexts: each passes `sluice check` on data of its size, of the published batch, rate and length."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.manifest import FILE, Manifest, Shard

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
IMAGENET, CIFAR = 1_281_167, 50_000
# recipe: samples, ranks, batch of a rank, peak rate, steps
RECIPES = {
    "rotation_rn50": (IMAGENET, 8, 16, 0.2, 70 * (IMAGENET // 128)),
    "rotation_rn18_cifar10": (CIFAR, 1, 128, 0.1, 200 * (CIFAR // 128)),
    "relative_patch_rn50": (IMAGENET, 8, 64, 0.2, 70 * (IMAGENET // 512)),
    "jigsaw_rn50": (IMAGENET, 8, 32, 0.1, 105 * (IMAGENET // 256)),
    "colorization_rn50": (IMAGENET, 1, 40, 3e-5, 500_000),
    "exemplar_rn18_cifar10": (16_000, 1, 128, 0.01, 150 * (16_000 // 128)),
    "autoencoder_rn18_cifar10": (CIFAR, 1, 256, 1e-3, 200 * (CIFAR // 256)),
}


def test_no_recipe_is_left_out():
    pretexts = ("rotation", "relative_patch", "jigsaw", "exemplar", "colorization", "autoencoder")
    assert {p.stem for p in CONFIGS.glob("*.toml") if p.stem.startswith(pretexts)} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, ranks, share, peak, steps = RECIPES[recipe]
    shards = (Shard("train-000000.tar", samples, 1, "0" * 64),)
    (tmp_path / FILE).write_text(Manifest(str(tmp_path), shards, {"image": ("jpg",)}).as_json())
    path, overrides = CONFIGS / f"{recipe}.toml", [f"data.train={tmp_path}"]
    if load_run(path, overrides).data.by_label:  # drawn from shards, which this data set, as large as that, has not got
        overrides.append("data.by_label=")
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    plan = resolve(load_run(path, overrides), samples, ranks)
    assert (plan.micro_batch, plan.accumulation) == (share, 1), "batch norm's statistics are those of one forward"
    assert plan.total_steps in (steps, steps + 1) and plan.peak_lr == pytest.approx(peak)
