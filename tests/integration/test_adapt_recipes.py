"""The shipped recipes of adaptation: each passes `sluice check` on data sets of their size, with published rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.check import check
from pipeline.config.load import load_run
from pipeline.config.resolve import learning_rate, resolve
from pipeline.config.sweep import is_sweep, load_sweep
from tests.integration.test_few_label_recipes import RECIPES as SOURCE_FREE_OR_FEW_LABELS
from tests.integration.test_mae_recipes import CONFIGS, data_set

FOLDER = Path(CONFIGS) / "adapt"
# recipe: samples of the source, classes, peak rate, steps, the rate at the end as a part of the peak
RECIPES = {
    "office31_dan": (2817, 31, 3e-3, 10_000, (1 + 3e-4 * 10_000) ** -0.75),
    "visda_dann": (152_397, 12, 0.01, 30_000, (1 + 1e-3 * 30_000) ** -0.75),
    "svhn_mnist_source": (73_257, 10, 1e-3, 10_000, 1),
    "svhn_mnist_adda": (73_257, 10, 2e-4, 10_000, 1),
    "pacs_coral": (3 * 1600, 7, 5e-5, 5001, 1),
}


def test_no_recipe_is_left_out_and_each_says_what_to_expect():
    own = {path.stem: path.read_text() for path in FOLDER.glob("*.toml")}
    recipes = {name for name, text in own.items() if "# Expect" in text}
    assert recipes == set(RECIPES) | set(SOURCE_FREE_OR_FEW_LABELS)
    assert all("https://" in own[name] and "# Command:" in own[name] and "# Hardware:" in own[name] for name in recipes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe, tmp_path, capsys):
    samples, classes, peak, steps, end = RECIPES[recipe]
    config = load_run(FOLDER / f"{recipe}.toml", [])
    several = [] if isinstance(config.data.train, str) else [source.domain for source in config.data.train]
    paths = {}
    for name in several or ["source", "target"]:
        (tmp_path / str(name)).mkdir()
        paths[name] = data_set(tmp_path / str(name), samples // max(len(several), 1), classes)
    if several:
        mixed = ", ".join(f"{{path = {json.dumps(paths[name])}, domain = {json.dumps(name)}}}" for name in several)
        overrides = [f"data.train=[{mixed}]"]
    else:
        overrides = [f"data.train={paths['source']}"]
    overrides += [f"data.beside.{name}.path={paths['target']}" for name in config.data.beside]
    check(FOLDER / f"{recipe}.toml", overrides, 1)
    assert "is sound" in capsys.readouterr().out
    plan = resolve(load_run(FOLDER / f"{recipe}.toml", overrides), samples, 1)
    assert (plan.accumulation, plan.total_steps) == (1, steps)
    assert plan.peak_lr == pytest.approx(peak)
    assert learning_rate(plan, plan.total_samples) == pytest.approx(peak * end, rel=1e-3)


@pytest.mark.parametrize("sweep", sorted(p.stem for p in FOLDER.glob("*.toml") if is_sweep(p)))
def test_every_run_of_a_sweep_is_configured_rightly(sweep):
    assert load_sweep(FOLDER / f"{sweep}.toml").variants
