"""The shipped recipes of distillation: each passes `sluice check` on a data set of its size, with published rates."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from data_prep.sidecar import SidecarWriter
from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.core.protocols import DataFacts
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from pipeline.data.outputs import MADE, MEMBER, plain
from pipeline.objectives import distill_clip
from pipeline.objectives.distill import Config, Distill
from tests.integration.test_mae_recipes import CONFIGS, IMAGENET, data_set
from tests.unit.data.shards import FIELDS, members, write_data
from tests.unit.data.test_text import WORDS, tokenizer

# recipe: ranks, peak rate, steps, millions of parameters of the student and of its teachers
RECIPES = {
    "deit_b_hard": (16, 5e-4 * 2, 300 * 1251, 86.6, 83.6),
    "resnet18_kd": (8, 0.1, 100 * 5004, 11.7, 21.8),
    "resnet18_dist": (8, 0.1, 100 * 5004, 11.7, 21.8),
    "funmatch_r50": (32, 0.03, 1200 * 312, 25.5, 236.3),
    "resnet8x4_kd": (1, 0.05, 240 * 781, 1.23, 7.43),
    "resnet8x4_dkd": (1, 0.05, 240 * 781, 1.23, 7.43),
    "wrn_16_2_kd": (1, 0.05, 240 * 781, 0.70, 2.26),
}
CIFAR100 = (50_000, 100)
# the same of CLIP's
OF_CLIP = {
    "tinyclip_b32_half": (16, 1e-4, 128_000_000 // 4096, 89.8, 151.3),
    "mobileclip_stored": (32, 1e-3, 1_280_000_000 // 8192, 66.4, 0.0),
}


def test_no_recipe_is_left_out():
    assert {p.stem for p in (Path(CONFIGS) / "distill").glob("*.toml")} == {*RECIPES, *OF_CLIP}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    ranks, peak, steps, own, taught = RECIPES[recipe]
    samples, classes = CIFAR100 if recipe.startswith(("resnet8x4", "wrn")) else IMAGENET
    overrides = [f"data.train={data_set(tmp_path, samples, classes)}"]
    path = CONFIGS / "distill" / f"{recipe}.toml"
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, ranks)
    assert (plan.accumulation, plan.total_steps) == (1, steps)
    assert plan.peak_lr == pytest.approx(peak)
    known = DataFacts(config.data.image.shape, tuple(f"class {i}" for i in range(classes)))
    with torch.device("meta"):
        objective = Distill(Config(**config.objective.settings), known)
    for parts, millions in (((objective.encoder, objective.head), own), ((objective.teachers,), taught)):
        assert sum(p.numel() for part in parts for p in part.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def stored_outputs(config: RunConfig, keys: list[str], folder: Path) -> list[str]:
    """Settings that join stored outputs to the recipe's data: nothing but what they say of themselves."""
    overrides = []
    settings = distill_clip.Config(**config.objective.settings)
    for name, field in settings.stored().items():
        teacher = settings.teachers[name]
        told = teacher.described(config.data.image.shape) | {"path": teacher.weights, "sha256": "0" * 64}
        facts = {"teacher": told, "outputs": {"image": teacher.dim, "text": teacher.dim}, "top": None}
        facts |= {"augmentations": config.data.augmentations, "augmentation_seed": 0, "image": plain(config.data.image)}
        facts |= {"captions": config.data.captions.model_dump(mode="json", exclude={"tokenizer"})}
        with closing(SidecarWriter(str(folder / field), {MADE: facts}, 1)) as writer:
            writer.begin()
            writer.write(0, keys, [[(MEMBER, b"")] for _ in keys])
            writer.finish()
        overrides.append(f"data.sidecar.{field}.path={folder / field}")
    return overrides


@pytest.mark.parametrize("recipe", OF_CLIP)
def test_a_recipe_of_clip_is_sound(recipe, tmp_path, capsys):
    ranks, peak, steps, own, taught = OF_CLIP[recipe]
    shards = write_data(
        tmp_path / "shards", [ranks], lambda n: members(n) | {"txt": b"a cat"}, FIELDS | {"caption": ("txt",)}
    )
    (tmp_path / "words.json").write_bytes(tokenizer([*WORDS, "!"]))
    overrides = [f"data.train={shards.root}", f"data.captions.tokenizer={tmp_path}/words.json"]
    path = CONFIGS / "distill" / f"{recipe}.toml"
    plan = resolve(load_run(path, overrides), 2_000_000_000, ranks)
    assert (plan.accumulation, plan.total_steps, plan.peak_lr) == (1, steps, pytest.approx(peak))
    config = load_run(path, overrides)
    if recipe.endswith("stored"):
        overrides += stored_outputs(config, [f"{n:06d}" for n in range(ranks)], tmp_path)
    # A batch of the little data that there is; all else is the recipe's.
    check(path, [*overrides, f"run.global_batch={ranks}", "engine.micro_batch=1"], ranks)
    assert "is sound" in capsys.readouterr().out
    known = facts(load_run(path, overrides).data, open_data(load_run(path, overrides).data))
    with torch.device("meta"):
        objective = distill_clip.DistillClip(distill_clip.Config(**config.objective.settings), known)
    for parts, millions in (((objective.image, objective.text), own), ((objective.teachers,), taught)):
        assert sum(p.numel() for part in parts for p in part.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
