"""Recipes of source-free adaptation and of few labels: each passes `sluice check` on data of its size."""

from __future__ import annotations

import pytest

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from tests.integration.test_mae_recipes import CONFIGS, data_set

OFFICE = {"source": 2536, "webcam": 795}
"""Images that are trained on: nine tenths of amazon's 2,817, and all of webcam's."""
# recipe: samples, classes, steps, peak rate
RECIPES = {
    "shot_office31_source": (OFFICE["source"], 31, 100 * (OFFICE["source"] // 64), 1e-2),
    "shot_office31": (OFFICE["webcam"], 31, 15 * (OFFICE["webcam"] // 64), 1e-2),
    "fixmatch_cifar10_40": (50_000, 10, 2**20, 0.03),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, classes, steps, peak = RECIPES[recipe]
    folder = data_set(tmp_path, samples, classes)
    path, overrides = CONFIGS / "adapt" / f"{recipe}.toml", [f"data.train={folder}"]
    given = load_run(path, overrides)
    if given.data.beside:
        # Labels are drawn from shards, which this data set only claims to have.
        overrides += [f"data.beside.unlabelled.path={folder}", "data.by_label="]
    check(path, overrides, 1)
    assert "is sound" in capsys.readouterr().out
    config = load_run(path, overrides)
    plan = resolve(config, samples, 1)
    assert (plan.accumulation, plan.total_steps) == (1, steps)
    assert plan.peak_lr == pytest.approx(peak)


def test_the_adapted_model_is_that_of_the_source():
    """So that its weights fit, and the classifier stays while the encoder moves at a tenth of the rate."""
    source, target = (load_run(CONFIGS / "adapt" / f"shot_office31{end}.toml", []) for end in ("_source", ""))
    own = {"encoder", "bottleneck", "weight_norm"}
    assert {k: source.objective.settings[k] for k in own} == {k: target.objective.settings[k] for k in own}
    assert target.start is not None and target.start.source == source.run.folder
    assert target.optimizer.groups == source.optimizer.groups != ()
