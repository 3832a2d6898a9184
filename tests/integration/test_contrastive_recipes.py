"""The contrastive recipes: each passes `sluice check` on data of its size, of the published size, rate and length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.manifest import FILE, Manifest, Shard
from pipeline.core.protocols import DataFacts, Objective
from pipeline.objectives import clip, daic, deep_cluster, moco, simclr, swav
from tests.unit.data.test_text import WORDS, tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET, CIFAR = 1_281_167, 50_000
# recipe: samples, ranks, batch of a rank, peak rate, steps, millions of parameters. CLIP's sizes are those of
# open_clip's ViT-B-32 and ViT-B-16, to the last one, SigLIP's that of its paper's B/16 with CLIP's vocabulary in place
# of its own of 32,000; ResNet's with the head's 2048^2 + 2048 * 128; MoCo counts all but the predictor twice.
RECIPES = {
    "clip_b32_datacomp_small": (12_800_000, 8, 256, 5e-4, 12_800_000 // 4096, 151.277313),
    "clip_b32_datacomp_medium": (128_000_000, 8, 256, 5e-4, 128_000_000 // 4096, 151.277313),
    "clip_b16_datacomp_large": (1_280_000_000, 32, 256, 5e-4, 1_280_000_000 // 8192, 149.620737),
    "siglip_b16": (1_280_000_000, 64, 256, 1e-3, 12_800_000_000 // 32768, 203.2 + (49408 - 32000) * 768e-6),
    "simclr_rn50_100": (IMAGENET, 32, 128, 0.3 * 4096 / 256, 100 * (IMAGENET // 4096), 28.0),
    "simclr_rn50_1000": (IMAGENET, 32, 128, 0.3 * 4096 / 256, 1000 * (IMAGENET // 4096), 28.0),
    "simclr_rn18_cifar10": (CIFAR, 1, 512, 1.0, 1000 * (CIFAR // 512), 11.5),
    "moco_v2_rn50": (IMAGENET, 8, 32, 0.03, 200 * (IMAGENET // 256), 2 * 28.0),
    "swav_rn50_800": (IMAGENET, 64, 64, 4.8, 800 * (IMAGENET // 4096), 23.5 + 4.46 + 0.384),
    "swav_rn50_200_bs256": (IMAGENET, 4, 64, 0.6, 200 * (IMAGENET // 256), 23.5 + 4.46 + 0.384),
    "deep_cluster_rn50": (IMAGENET, 8, 32, 0.05, 200 * (IMAGENET // 256), 23.5 + 2049e-6 * 10_000),
    "daic_cifar10": (CIFAR, 1, 128, 1e-3, 50 * (CIFAR // 128), 11.17),
    "moco_v3_vit_b": (IMAGENET, 64, 64, 1.5e-4 * 16, 300 * (IMAGENET // 4096), 2 * 106.9 + 2.1),
}
OBJECTIVES = {"clip": (clip.Config, clip.CLIP), "simclr": (simclr.Config, simclr.SimCLR)}
OBJECTIVES |= {"moco": (moco.Config, moco.MoCo), "swav": (swav.Config, swav.SwAV), "daic": (daic.Config, daic.DAIC)}
OBJECTIVES |= {"deep_cluster": (deep_cluster.Config, deep_cluster.DeepCluster)}


def data_set(folder: Path, samples: int) -> str:
    shards = tuple(Shard(f"train-{i:06}.tar", samples // 128 + (i < samples % 128), 1, "0" * 64) for i in range(128))
    fields = {"image": ("jpg",), "caption": ("txt",)}
    (folder / FILE).write_text(Manifest(str(folder), shards, fields).as_json())
    return str(folder)


def test_no_recipe_is_left_out():
    names = {p.stem for p in (CONFIGS / "pretrain").glob("*.toml")}
    assert {n for n in names if n.startswith(("clip", "siglip", "simclr", "moco", "swav", "deep", "daic"))} == set(
        RECIPES
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, ranks, share, peak, steps, millions = RECIPES[recipe]
    path, overrides = CONFIGS / "pretrain" / f"{recipe}.toml", [f"data.train={data_set(tmp_path, samples)}"]
    if "text" in load_run(path, overrides).data.fields:  # CLIP's own vocabulary is not installed here
        (tmp_path / "words.json").write_bytes(tokenizer([*WORDS, "!"]))
        overrides.append(f"data.captions.tokenizer={tmp_path}/words.json")
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, ranks)
    assert plan.micro_batch == share and plan.total_steps in (steps, steps + 1)
    assert plan.peak_lr == pytest.approx(peak)
    settings, cls = OBJECTIVES[config.objective.name]
    with torch.device("meta"):
        facts = DataFacts(config.data.image.shape, (), samples)
        objective: Objective = cls(settings(**config.objective.settings), facts)
    tolerance = 1e-12 if recipe.startswith("clip") else 0.005
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, rel=tolerance)
    if recipe.startswith(("simclr", "moco")):
        # Batch norm's statistics are those of one forward over all ranks, and a queue holds whole batches.
        assert plan.accumulation == 1
    if recipe == "moco_v2_rn50":
        assert config.objective.settings["queue"] % plan.global_batch == 0
