"""Which runs a sweep has, what they are called, and what is wrong with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import load_run
from pipeline.config.mistakes import Mistakes
from pipeline.config.sweep import is_sweep, load_sweep, value_name

SMOKE = Path(__file__).parents[3] / "configs" / "smoke" / "mae.toml"


def write(place: Path, **sweep: Any) -> Path:
    path = place / "sweep.toml"
    path.write_text(tomli_w.dumps({"base": [str(SMOKE)], "run": {"folder": "runs/s"}, "sweep": sweep}))
    return path


def names(path: Path) -> list[str]:
    return [variant.name for variant in load_sweep(path).variants]


def test_the_product_of_list_grid_and_seeds(tmp_path):
    """Against a plain product; each configuration is that of the base file with the settings given by hand."""
    entries = [{"name": "thin", "objective": {"decoder_dim": 16}}, {"name": "wide", "objective.decoder_dim": 32}]
    grid = {"optimizer.lr": [1e-4, 0.01], "objective.mask_ratio": [0.5]}
    path = write(tmp_path, list=entries, grid=grid, seeds=[3, 7])
    plan = load_sweep(path, ["engine.micro_batch=2"])
    wanted = list(itertools.product((("thin", 16), ("wide", 32)), (1e-4, 0.01), (3, 7)))
    assert plan.folder == Path("runs/s") and len(plan.variants) == len(wanted)
    for variant, ((title, dim), lr, seed) in zip(plan.variants, wanted, strict=True):
        shown = {1e-4: "1e-4", 0.01: "0.01"}[lr]
        assert variant.name == f"{title},lr={shown},mask_ratio=0.5,seed={seed}"
        settings = [f"objective.decoder_dim={dim}", f"optimizer.lr={lr}", "objective.mask_ratio=0.5"]
        place = [f"run.seed={seed}", f"run.folder='runs/s/{variant.name}'", "engine.micro_batch=2"]
        assert variant.config == load_run(SMOKE, [*settings, *place])


def test_a_text_of_the_list_names_the_seed(tmp_path):
    """So that a second stage starts from the first one with the same seed; the number alone is a number."""
    labels = {"per_class": 1, "seed": "{seed}"}
    entry = {"name": "second", "start.from": "runs/first/seed={seed}", "data.by_label": labels}
    plan = load_sweep(write(tmp_path, list=[entry], seeds=[3, 7]))
    found = [(v.name, v.config.start.source, v.config.data.by_label.seed) for v in plan.variants]
    assert found == [(f"second,seed={n}", f"runs/first/seed={n}", n) for n in (3, 7)]
    (alone,) = load_sweep(write(tmp_path, list=[{"name": "second", "start.from": "runs/{seed}"}])).variants
    assert alone.config.start.source == "runs/{seed}"


def test_names_say_as_much_of_a_key_as_is_needed(tmp_path):
    grid = {"optimizer.lr": [0.1], "optimizer.groups": [[{"prefix": "head", "lr": 2.0}]], "data.image.size": [32]}
    (name,) = names(write(tmp_path, grid=grid))
    assert name.startswith("lr=0.1,groups=") and name.endswith(",size=32")
    path = write(tmp_path, grid={"data.image.size": [32], "every.log": ["1ba"], "every.checkpoint": ["2ba"]}, seeds=1)
    assert names(path) == ["size=32,log=1ba,checkpoint=2ba,seed=0"]
    path = write(tmp_path, grid={"optimizer.name": ["adamw"], "schedule.name": ["cosine"]})
    assert names(path) == ["optimizer.name=adamw,schedule.name=cosine"]


def test_names_stay_when_values_are_added(tmp_path):
    before = names(write(tmp_path, grid={"optimizer.lr": [0.1, 0.2]}, seeds=2))
    after = names(write(tmp_path, grid={"optimizer.lr": [0.05, 0.2, 0.1]}, seeds=3))
    assert set(before) < set(after) and len(set(after)) == 9


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e-4, "1e-4"),
        (1.5e-4, "1.5e-4"),
        (-3e-5, "-3e-5"),
        (0.75, "0.75"),
        (1.0, "1.0"),
        (0.0, "0.0"),
        (2e6, "2e6"),
        (8, "8"),
        (True, "true"),
        ([0.9, 0.95], "0.9_0.95"),
        ("90ep", "90ep"),
        ([], "none"),
    ],
)
def test_values_in_names(value, name):
    assert value_name(value) == name


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_back_from_its_name(value):
    assert float(value_name(value)) == value


@given(st.lists(st.text(max_size=60), min_size=2, max_size=2, unique=True))
def test_texts_have_names_of_their_own_that_are_safe(texts):
    first, second = map(value_name, texts)
    assert first != second
    for name in (first, second):
        assert len(name) < 60 and not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-~"
        )


def test_long_names_are_cut_and_stay_apart(tmp_path):
    grid = {f"objective.encoder_args.x{n}": [f"{'v' * 30}"] for n in range(6)} | {"optimizer.lr": [0.1, 0.2]}
    first, second = names(write(tmp_path, grid=grid))
    assert first != second and max(len(first), len(second)) <= 150


def test_seeds_alone_and_none(tmp_path):
    assert names(write(tmp_path, seeds=2)) == ["seed=0", "seed=1"]
    assert names(write(tmp_path, grid={"optimizer.lr": [0.1]})) == ["lr=0.1"]


def test_a_file_that_builds_on_a_sweep_is_one(tmp_path):
    write(tmp_path, grid={"optimizer.lr": [0.1]})
    more = tmp_path / "more.toml"
    more.write_text('base = ["sweep.toml"]\n[sweep]\nseeds = 2\n')
    assert is_sweep(more) and not is_sweep(SMOKE)
    assert names(more) == ["lr=0.1,seed=0", "lr=0.1,seed=1"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"seeds": 0}, "sweep.seeds"),
        ({"grid": {"optimizer.lr": 0.1}}, r"grid: optimizer.lr needs a list of values"),
        ({"grid": {"optimizer.lr": []}}, "grid: optimizer.lr needs a list of values"),
        ({"grid": {"run.seed": [1]}}, "write seeds = 3"),
        ({"grid": {"run.folder": ["x"]}}, "name the runs by their settings"),
        ({"seed": 3}, r"sweep.seed: unknown key \(did you mean 'seeds'\?\)"),
        ({"suite": "x"}, "nothing to vary"),
        ({"grid": {"optimizer.lr": [0.1, 0.1]}}, "2 runs are called 'lr=0.1'"),
        ({"list": [{"name": "a", "optimizer.lr": 0.1}, {"name": "a"}]}, "2 runs are called 'a'"),
        ({"grid": {"optimizer.lrr": [0.1]}}, r"optimizer.lrr: unknown key \(did you mean 'lr'\?\)"),
        ({"grid": {"a.b": list(range(200)), "a.c": list(range(200))}}, "has 40,000 runs"),
    ],
)
def test_mistakes_of_the_sweep(tmp_path, sweep, message):
    with pytest.raises(Mistakes, match=message):
        load_sweep(write(tmp_path, **sweep))


def test_a_mistake_is_told_once_with_the_runs_that_have_it(tmp_path):
    path = write(tmp_path, grid={"optimizer.lr": [-1.0, 0.1], "engine.zero": [1, 9]}, seeds=5)
    with pytest.raises(Mistakes) as caught:
        load_sweep(path, ["run.keep=0"])
    lr, zero, keep = sorted(caught.value.problems, key=lambda line: ("keep" in line, "zero:" in line))
    assert lr.startswith(
        "lr=-1.0,zero=1,seed=0, lr=-1.0,zero=1,seed=1, lr=-1.0,zero=1,seed=2 and 7 more: optimizer.lr: "
    )
    assert "engine.zero: expected 0, 1, 2 or 3, found 9" in zero and keep.startswith("run.keep: expected")
