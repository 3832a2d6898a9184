"""Many runs side by side."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Number
from pipeline.record.files import Lines, read_lines
from pipeline.record.notes import Remarks, read_remarks, remark
from pipeline.record.outputs import keep
from pipeline.record.results import Origin
from pipeline.record.runs import (
    Listed,
    chosen,
    condition,
    config_differences,
    gather_seeds,
    ordered,
    read_run,
)


def with_config(folder: Path, **tables: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps({"run": {"folder": str(folder), "seed": 0}, **tables}))
    return folder


def test_only_settings_that_differ_are_told(tmp_path):
    a = with_config(tmp_path / "a", optimizer={"lr": 1e-3, "betas": [0.9, 0.95]}, objective={"name": "mae"})
    b = with_config(tmp_path / "b", optimizer={"lr": 3e-4, "betas": [0.9, 0.95]}, objective={"name": "mae"})
    c = with_config(tmp_path / "c", optimizer={"lr": 3e-4, "betas": [0.9, 0.99]}, ema={"decay": 0.9})
    assert config_differences([a, b, c]) == {
        "ema.decay": ("absent", "absent", 0.9),
        "objective.name": ("mae", "mae", "absent"),
        "optimizer.betas": ([0.9, 0.95], [0.9, 0.95], [0.9, 0.99]),
        "optimizer.lr": (1e-3, 3e-4, 3e-4),
    }
    assert config_differences([b, a])["optimizer.lr"] == (3e-4, 1e-3)
    assert config_differences([a]) == {} == config_differences([a, a])


def test_kinds_of_values_are_told_apart(tmp_path):
    values = [1, 1.0, True, "1"]
    folders = [with_config(tmp_path / str(n), objective={"x": value}) for n, value in enumerate(values)]
    for n in range(1, 4):
        assert config_differences([folders[0], folders[n]]) == {"objective.x": (1, values[n])}


def test_a_run_without_a_configuration_and_a_damaged_one(tmp_path):
    a = with_config(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert config_differences([a, tmp_path / "b"]) == {"run.seed": (0, "absent")}
    (tmp_path / "b" / "config.toml").write_text("[run\n")
    with pytest.raises(DataError, match="is damaged"):
        config_differences([a, tmp_path / "b"])


def listed(name: str, measured: dict[str, Any], state: str = "finished", **settings: Any) -> Listed:
    facts = {"run": name, "state": state, "step": 5, "total_steps": 5, "tags": [], "note": "", "error": ""}
    return Listed(Path(name), facts, {k.replace("__", "."): v for k, v in settings.items()}, measured)


RUNS = [
    listed("a", {"loss": 0.5, "knn/top1": 0.6}, optimizer__lr=1e-4, objective__name="mae"),
    listed("b", {"loss": 0.4, "knn/top1": 0.7}, "failed", optimizer__lr=1e-3, objective__name="mae"),
    listed("c", {"loss": math.nan}, optimizer__lr=1e-3, objective__name="clip"),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("optimizer.lr > 1e-4", "bc"),
        ("optimizer.lr>1e-4 and not state == 'failed'", "c"),
        ("knn/top1 >= 0.6", "ab"),
        ("1e-4 < optimizer.lr < 2e-3 and objective.name in ('mae', 'x.y/z')", "b"),
        ("`optimizer.lr` == 0.001", "bc"),
        ("knn/top1 == None", "c"),
        ('objective.name == "mae" or loss == None', "abc"),
        ("loss < 0.45", "b"),
    ],
)
def test_conditions_on_any_setting_metric_and_state(text, names):
    assert "".join(run.facts["run"] for run in chosen(RUNS, condition(text))) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizr.lr > 1", r"no run has 'optimizr.lr'; did you mean 'optimizer.lr'\?"),
        ("knn/top5 > 1", r"did you mean 'knn/top1'\?"),
        ("objective.name > 1", "'mae' is no number"),
        ("optimizer.lr", "compares nothing"),
        ("optimizer.lr = 1", "is written like"),
    ],
)
def test_conditions_that_name_nothing_or_make_no_sense(text, message):
    with pytest.raises(ConfigError, match=message):
        chosen(RUNS, condition(text))


@pytest.mark.parametrize(
    ("key", "names"),
    [("loss", "bac"), ("-loss", "abc"), ("knn/top1", "bac"), ("-knn/top1", "abc"), ("run", "abc"), ("-run", "cba")],
)
def test_the_best_comes_first_and_what_has_no_value_last(key, names):
    better = {"knn/top1": "higher"}
    runs = [Listed(r.folder, r.facts, r.settings, r.measured, better if "knn/top1" in r.measured else {}) for r in RUNS]
    assert "".join(run.facts["run"] for run in ordered(runs, key)) == names


def test_an_order_by_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"did you mean 'loss'\?"):
        ordered(RUNS, "-los")


def test_seeds_are_gathered_as_mean_and_standard_error():
    """Against numpy; runs that have not finished are counted and not averaged."""
    values = [0.61, 0.68, 0.64, 0.7]
    seeds = [
        listed(f"x/lr=1e-3,seed={n}", {"knn/top1": value}, run__seed=n, optimizer__lr=1e-3, run__folder=f"x/{n}")
        for n, value in enumerate(values)
    ]
    failed = listed("x/lr=1e-3,seed=9", {"knn/top1": 0.1}, "failed", run__seed=9, optimizer__lr=1e-3)
    other = listed("x/lr=1e-4,seed=0", {"knn/top1": 0.2}, run__seed=0, optimizer__lr=1e-4)
    together, alone = gather_seeds([*seeds, failed, other])
    assert together.measured["knn/top1"] == pytest.approx(np.mean(values), rel=1e-12)
    assert together.errors["knn/top1"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(4), rel=1e-12)
    assert (together.facts["run"], together.facts["state"], together.runs) == ("x/lr=1e-3", "4 finished, 1 failed", 5)
    assert alone == other and alone.errors == {}


def test_runs_whose_settings_are_not_known_are_not_taken_for_each_other():
    assert len(gather_seeds([listed("a", {"loss": 1.0}), listed("b", {"loss": 2.0})])) == 2


def test_of_a_metric_the_latest_step_counts_and_splits_are_told_apart(tmp_path):
    def kept(step: int | None, value: float, split: str = "val") -> None:
        number = [Number("knn/top1", value, 100, split, 0.02)]
        keep(tmp_path, number, Origin(f"step {step}", step, f"{step}", "knn", {}, {"val": split}))

    for step, value in ((20, 0.5), (10, 0.9), (None, 0.95)):
        kept(step, value)
    kept(20, 0.4, "test")
    run = read_run(tmp_path, settings=False)
    assert run.measured == {"knn/top1": 0.5, "knn/top1@test": 0.4}
    assert run.errors["knn/top1"] == 0.02 and run.better["knn/top1"] == "higher"


def test_one_run_that_cannot_be_read_says_why_and_spoils_nothing(tmp_path):
    folder = with_config(tmp_path / "a")
    (folder / "config.toml").write_text("[run\n")
    run = read_run(folder, settings=True)
    assert run.facts["state"] == "unreadable" and "config.toml is damaged" in run.facts["error"]
    assert read_run(folder, settings=False).facts["state"] == ""
    (folder / "metrics.jsonl").write_text("[1]\n")
    assert read_run(folder, settings=False).facts["state"] == "unreadable"


def test_a_damaged_result_is_told_beside_the_others(tmp_path):
    number = [Number("knn/top1", 0.5, 100, "val", 0.02)]
    keep(tmp_path, number, Origin("step 3", 3, "ab", "knn", {}, {"val": "ab"}))
    (tmp_path / "results" / "knn-torn.json").write_text("{")
    run = read_run(tmp_path, settings=False)
    assert run.measured == {"knn/top1": 0.5} and "knn-torn.json" in run.facts["error"]


def test_notes_and_tags_of_people_beside_the_words_of_the_run(tmp_path):
    with closing(Lines(tmp_path / "notes.jsonl")) as lines:
        lines.append({"time": "2026-01-05T10:00:00+00:00", "attempt": 0, "text": "resumed"})
    assert read_remarks(tmp_path) == Remarks()
    assert remark(tmp_path, "ann", "spike at 700", ["good", "paper"], []).tags == ("good", "paper")
    assert remark(tmp_path, "bob", "", [], ["good"]) == Remarks(("paper",), "spike at 700")
    assert remark(tmp_path, "bob", "", ["good", "paper"], []).tags == ("paper", "good")
    rows = read_lines(tmp_path / "notes.jsonl")[0]
    assert [row["text"] for row in rows] == ["resumed", "spike at 700", "tag good taken away", "tag good, tag paper"]
    assert [row.get("author") for row in rows] == [None, "ann", "bob", "bob"]
