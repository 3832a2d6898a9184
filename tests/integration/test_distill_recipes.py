"""The shipped recipes of distillation: each passes `sluice check` on a data set of its size, with published rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.protocols import DataFacts
from pipeline.objectives.distill import Config, Distill
from tests.integration.test_mae_recipes import CONFIGS, IMAGENET, data_set

# recipe: ranks, peak rate, steps, millions of parameters of the student and of its teachers
RECIPES = {
    "deit_b_hard": (16, 5e-4 * 2, 300 * 1251, 86.6, 83.6),
    "resnet18_kd": (8, 0.1, 100 * 5004, 11.7, 21.8),
    "resnet18_dist": (8, 0.1, 100 * 5004, 11.7, 21.8),
    "funmatch_r50": (32, 0.03, 1200 * 312, 25.5, 236.3),
}


def test_no_recipe_is_left_out():
    assert {p.stem for p in (Path(CONFIGS) / "distill").glob("*.toml")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    ranks, peak, steps, own, taught = RECIPES[recipe]
    overrides = [f"data.train={data_set(tmp_path, *IMAGENET)}"]
    path = CONFIGS / "distill" / f"{recipe}.toml"
    check(path, overrides, ranks)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, IMAGENET[0], ranks)
    assert (plan.accumulation, plan.total_steps) == (1, steps)
    assert plan.peak_lr == pytest.approx(peak)
    facts = DataFacts(config.data.image.shape, tuple(f"class {i}" for i in range(IMAGENET[1])))
    with torch.device("meta"):
        objective = Distill(Config(**config.objective.settings), facts)
    for parts, millions in (((objective.encoder, objective.head), own), ((objective.teachers,), taught)):
        assert sum(p.numel() for part in parts for p in part.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
