"""What is compared, how, and what is not."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Number
from pipeline.record.compared import FORMATS, comparison_csv, comparison_json, comparison_markdown, comparison_text
from pipeline.record.comparing import Comparison, Subject, compare, subjects_of
from pipeline.record.judging import leading
from pipeline.record.lines import lines
from pipeline.record.outputs import keep
from pipeline.record.records import About
from pipeline.record.results import Origin, read_results
from pipeline.record.statistics import mcnemar, tango

N = 400
RNG = np.random.default_rng(0)
HITS = RNG.random(N) < 0.6
BETTER = HITS | (RNG.random(N) < 0.15)
LOSS = RNG.gamma(2.0, size=N).astype(np.float32)


def top1(hits: np.ndarray, name="knn/top1") -> Number:
    p = float(hits.mean())
    return Number(name, p, len(hits), "val", math.sqrt(p * (1 - p) / len(hits)), samples=hits)


def loss(values: np.ndarray) -> Number:
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Number("loss", float(values.mean()), len(values), "val", error, "lower", samples=values)


def measured(folder: Path, *numbers: Number, model="step 10", step: int | None = 10, **origin) -> Path:
    """Add to a folder of results."""
    known = {"weights": f"{folder}{model}", "settings": {"k": 20, "image": {"size": 224}}, "data": {"test": "m" * 32}}
    keep(folder, numbers, Origin(model=model, step=step, evaluation="knn", **{**known, **origin}))
    return folder


def found(*folders: Path) -> Comparison:
    return compare(subjects_of([str(folder) for folder in folders]))


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return (
        measured(tmp_path / "plain", top1(HITS), loss(LOSS)),
        measured(tmp_path / "tuned", top1(BETTER), loss(LOSS * np.float32(0.99))),
    )


def test_right_or_wrong_is_mcnemars(runs):
    top, lower = found(*runs).compared
    won = int((BETTER & ~HITS).sum())
    assert (top.metric, top.against, top.subject) == ("knn/top1", "plain: step 10", "tuned: step 10")
    assert top.difference.value == pytest.approx(won / N) and top.difference.p == mcnemar(0, won)
    assert (top.difference.low, top.difference.high) == tango(0, won, N)
    assert lower.difference.p < top.difference.p and lower.p == 2 * lower.difference.p  # Holm's, of two
    assert top.p == top.difference.p and top.verdict == "better"
    assert lower.verdict == "better" and lower.difference.value < 0  # lower is good
    assert "bootstrap of 400 samples" in lower.difference.method and lower.difference.smallest < 0.01


def test_what_is_known_by_errors_alone_is_not_paired_and_says_so(tmp_path):
    plain = measured(
        tmp_path / "a", top1(HITS)._replace(samples=None), Number("frechet", 10.0, N, "val", None, "lower")
    )
    tuned = measured(tmp_path / "b", top1(BETTER), Number("frechet", 12.0, N, "val", None, "lower"))
    top, frechet = found(plain, tuned).compared
    assert top.difference.method == "unpaired, from standard errors (one tells nothing of its samples)"
    errors = [math.sqrt(h.mean() * (1 - h.mean()) / N) for h in (HITS, BETTER)]
    assert top.difference.high - top.difference.low == pytest.approx(2 * 1.959964 * math.hypot(*errors))
    assert frechet.difference.value == 2.0 and math.isnan(frechet.p) and frechet.verdict == "unknown"
    assert top.p == top.difference.p  # what has no p is no comparison


def test_facts_of_the_measurement_are_not_compared_and_told_where_they_differ(tmp_path):
    def facts(c: float) -> list[Number]:
        chosen = Number("knn/c", c, N, "train", better=None)
        return [
            chosen,
            Number("knn/at_edge", 0.0, N, "train", better=None),
            chosen._replace(name="knn/gap", stderr=0.1),
        ]

    comparison = found(measured(tmp_path / "a", *facts(0.1)), measured(tmp_path / "b", *facts(10.0)))
    assert [one.metric for one in comparison.compared] == ["knn/gap"] and comparison.compared[0].verdict == "differs"
    (other,) = comparison.unlike
    assert (other.metric, other.why) == ("knn/c", "it tells how it was measured: 0.1 and 10")


def test_values_orders_of_magnitude_apart_are_not_rounded_to_nothing(tmp_path):
    one = measured(tmp_path / "one", Number("lr/c", 5882.35, 9, "train"))
    other = measured(tmp_path / "other", Number("lr/c", 0.05882, 9, "train"))
    words = comparison_text(found(one, other)).split()
    assert {"5882", "0.05882", "-5882"} <= set(words)


def test_damaged_outcomes_are_named_and_errors_used(runs):
    (file,) = (runs[1] / "results").glob("*.npz")
    file.write_bytes(b"damaged")
    top, _ = found(*runs).compared
    assert top.difference.method == f"unpaired, from standard errors ({file.name} cannot be read)"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data": {"test": "n" * 32}}, "test data: mmmmmm and nnnnnn"),
        ({"settings": {"k": 20, "image": {"size": 192}}}, "image.size: 224 and 192"),
        ({"settings": {"k": 20, "image": {"size": 224}, "limit": 50}}, "limit: none and 50"),
        ({"settings": {"k": 5, "image": {"size": 192}}}, "k: 20 and 5; image.size: 224 and 192"),
        ({"seed": 3}, "seed: none and 3"),
        ({"version": 2}, "version: 1 and 2"),
        ({"evaluation": "probe"}, "only a: step 10 has it"),
    ],
)
def test_unlike_things_are_not_compared_and_it_says_why(tmp_path, other, why):
    plain = measured(tmp_path / "a", top1(HITS))
    evaluation = other.pop("evaluation", "knn")
    known = {"settings": {"k": 20, "image": {"size": 224}}, "data": {"test": "m" * 32}} | other
    keep(tmp_path / "b", [top1(BETTER)], Origin(model="step 10", step=10, weights="w", evaluation=evaluation, **known))
    comparison = found(plain, tmp_path / "b")
    assert comparison.compared == [] and comparison.unlike[0].why == why
    text = comparison_text(comparison)
    assert "nothing was measured alike" in text and f"not compared: knn/top1: {why}" in text


def test_data_sets_are_held_against_those_of_their_name(tmp_path):
    def on(folder: Path, data: str, mark: str, hits: np.ndarray) -> None:
        keep(folder, [top1(hits)], Origin("step 1", 1, f"{folder}", "knn", {}, {"test": mark}), About(data_name=data))

    a, b = tmp_path / "a", tmp_path / "b"
    for data in ("cifar", "dtd", "pets"):
        on(a, data, data, HITS)
    on(b, "cifar", "cifar", BETTER)
    on(b, "dtd", "other", BETTER)
    on(b, "cars", "cars", BETTER)
    comparison = found(a, b)
    assert [one.data for one in comparison.compared] == ["cifar"]
    why = {one.data: one.why for one in comparison.unlike}
    only = {name: f"only {run}: step 1 has it" for name, run in (("pets", "a"), ("cars", "b"))}
    assert why == {"dtd": "test data: dtd and other", **only}
    assert "not compared: knn/top1 on pets: only a: step 1 has it" in comparison_text(comparison)


def test_another_stream_is_named(tmp_path):
    plain = measured(tmp_path / "a", top1(HITS))
    other = measured(tmp_path / "b", top1(BETTER)._replace(split="test"))
    assert [one.why for one in found(plain, other).unlike] == ["stream: val and test"]


def test_the_nearest_of_several_settings_is_what_it_is_told_from(tmp_path):
    plain = measured(tmp_path / "a", top1(HITS), settings={"k": 20, "t": 1})
    measured(tmp_path / "a", top1(HITS), settings={"k": 5, "t": 2})
    other = measured(tmp_path / "b", top1(BETTER), settings={"k": 5, "t": 3})
    (one,) = found(plain, other).unlike
    assert one.why == "t: 2 and 3"
    measured(other, top1(BETTER), settings={"k": 20, "t": 1})
    (one,) = found(plain, other).compared
    assert one.metric == "knn/top1 [k=20, t=1]"


def test_seeds_that_both_have_are_one_comparison(tmp_path):
    """Against the two-way analysis of variance, done by hand on the differences."""
    plain, tuned = tmp_path / "a", tmp_path / "b"
    rng = np.random.default_rng(1)
    d = np.empty((3, N))
    for seed in range(4):
        a, b = (rng.normal(size=N).astype(np.float32) + LOSS for _ in range(2))
        measured(plain, loss(a), seed=seed)
        if seed != 3:
            measured(tuned, loss(b), seed=seed)
            d[seed] = b.astype(np.float64) - a
    (one,) = found(plain, tuned).compared
    assert one.first.seeds == one.second.seeds == (0, 1, 2)
    assert one.difference.value == pytest.approx(d.mean(), rel=1e-5)
    samples = 3 * d.mean(0).var(ddof=1)
    seeds = N * d.mean(1).var(ddof=1)
    rest = d - d.mean(0) - d.mean(1)[:, None] + d.mean()
    left = (rest**2).sum() / (2 * (N - 1))
    error = math.sqrt((samples + max(seeds - left, 0)) / (3 * N))
    half = (one.difference.high - one.difference.low) / 2
    assert 1.96 * error < half < 6 * error and one.difference.method == "3 seeds x 400 samples"


def test_seeds_of_numbers_without_samples(tmp_path):
    plain, tuned = tmp_path / "a", tmp_path / "b"
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.52, 0.63), (0.49, 0.58)]):
        measured(plain, Number("few/top1", a, N, "val", None), seed=seed)
        measured(tuned, Number("few/top1", b, N, "val", None), seed=seed)
    (one,) = found(plain, tuned).compared
    differences = [0.1, 0.11, 0.09]
    half = 4.302653 * np.std(differences, ddof=1) / math.sqrt(3)  # Student's t of two degrees of freedom
    assert (one.difference.low, one.difference.high) == pytest.approx((0.1 - half, 0.1 + half))


def test_a_line_of_several_seeds_holds_their_mean(tmp_path):
    for model, step, base in (("step 10", 10, 0.5), ("step 20", 20, 0.7)):
        for seed in range(3):
            measured(tmp_path, Number("few/top1", base + seed / 10, N, "val", 0.03), model=model, step=step, seed=seed)
    (line,) = lines(read_results(tmp_path).rows)
    assert [c.value for c in line.measured] == pytest.approx([0.6, 0.8]) and len(line.measured[0].rows) == 3
    assert line.measured[0].stderr == pytest.approx(math.sqrt(0.01 / 3 + 0.03**2))
    measured(tmp_path, Number("few/top1", 0.9, N, "val", 0.03), model="step 30", step=30, seed=0)
    names = [line.name for line in lines(read_results(tmp_path).rows)]
    assert names == [f"few/top1 [seed={seed}]" for seed in range(3)]  # other seeds: no mean of the same


def test_all_that_are_not_significantly_worse_are_marked(tmp_path):
    close = BETTER.copy()
    close[np.flatnonzero(BETTER)[:2]] = False
    for step, hits in enumerate([HITS, close, BETTER]):
        measured(tmp_path, top1(hits), model=f"step {step}", step=step)
    (line,) = lines(read_results(tmp_path).rows)
    assert leading(line) == ["", "level", "best"]
    unknown = replace(
        line,
        cells=tuple(
            c and replace(c, stderr=None, rows=(replace(c.rows[0], outcomes=None, stderr=None),)) for c in line.cells
        ),
    )
    assert leading(unknown) == ["", "", "best"]


def test_which_models_are_meant(tmp_path):
    run = tmp_path / "mae"
    for step in (10, 20, 100):
        measured(run, top1(HITS), model=f"step {step}", step=step)
    measured(run, top1(~HITS), model="random init", step=None)
    other = measured(tmp_path / "other", top1(BETTER))
    (run / "config.toml").touch()
    (run / "checkpoints/step-00000020").mkdir(parents=True)
    (run / "checkpoints/step-00000020/checkpoint.json").write_text('{"step": 20}')

    def names(*words: object) -> list[str]:
        return [one.name for one in subjects_of([str(word) for word in words])]

    assert names(run, other) == ["mae: step 100", "other: step 10"]
    assert names(f"{run}@20", other) == ["mae: step 20", "other: step 10"]
    assert names(run / "checkpoints/step-00000020", f"{run}@10") == ["step 20", "step 10"]
    assert names(f"{run}@random init", f"{run}@all") == ["random init", "step 10", "step 20", "step 100"]
    assert names(run, "random init", "20") == ["random init", "step 20"]
    assert names(f"{run}@10", "20", other) == ["mae: step 10", "mae: step 20", "other: step 10"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "{run}"], "nowhere is no folder of results"),
        (["{run}@30", "{run}"], r"has no model '30'; there are 'step 10', 'a', 'b'"),
        (["{run}"], r"only 'step 10' of .* is named, and two are needed .* also 'a', 'b'"),
        (["{run}", "{empty}"], r"empty has no results; evaluate it first: sluice eval .*empty SUITE"),
        (["{baselines}", "{run}"], r"holds 'a', 'b': say which, .*@MODEL, or .*@all"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, words, message):
    run, baselines = tmp_path / "run", tmp_path / "baselines"
    measured(run, top1(HITS))
    for name in ("a", "b"):
        measured(run, top1(HITS), model=name, step=None)
        measured(baselines, top1(HITS), model=name, step=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        subjects_of([word.format(run=run, baselines=baselines, empty=tmp_path / "empty") for word in words])


def test_of_weights_of_one_name_the_newest_count(tmp_path):
    run = measured(tmp_path / "run", top1(HITS))
    measured(run, top1(BETTER), weights="again")
    other = measured(tmp_path / "other", top1(HITS))
    (_, first) = subjects_of([str(other), str(run)])
    assert [row.weights for row in first.rows] == ["again"]


def test_the_texts_say_the_same(runs):
    comparison = found(*runs)
    text = comparison_text(comparison)
    assert "tuned: step 10 against plain: step 10" in text and "better" in text and "Holm's correction for 2" in text
    assert "McNemar, exact: knn/top1" in text.splitlines() or "McNemar, corrected: knn/top1" in text.splitlines()
    assert max(map(len, text.splitlines()[:6])) <= 120  # a table that a terminal has room for
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    body = json.loads(comparison_json(comparison))
    assert [float(row["p_corrected"]) for row in rows] == [one.p for one in comparison.compared]
    assert [one["difference"] for one in body["compared"]] == [one.difference.value for one in comparison.compared]
    assert body["subjects"] == comparison.subjects and set(FORMATS) == {"text", "md", "csv", "json"}
    table = [line for line in comparison_markdown(comparison).splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_a_pipe_in_a_name_does_not_end_a_cell_of_markdown(tmp_path):
    rows = [read_results(measured(tmp_path / name, top1(h, "a|b"))).rows for name, h in (("x", HITS), ("y", BETTER))]
    comparison = compare([Subject("x|", rows[0]), Subject("y", rows[1])])
    assert "| a\\|b |" in comparison_markdown(comparison)


def test_settings_in_which_the_runs_differ_are_told(runs):
    for folder, rate in zip(runs, (0.001, 0.01), strict=True):
        (folder / "config.toml").write_text(f'[run]\nfolder = "{folder}"\nseed = 1\n[optimizer]\nlr = {rate}\n')
    comparison = found(*runs)
    assert comparison.settings == {"optimizer.lr": (0.001, 0.01)}
    assert "setting optimizer.lr: 0.001, 0.01" in comparison_text(comparison)
    assert json.loads(FORMATS["json"](comparison))["settings"] == {"optimizer.lr": [0.001, 0.01]}
