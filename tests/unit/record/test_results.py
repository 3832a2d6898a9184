import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Number
from pipeline.record.lines import lines, models
from pipeline.record.outputs import found, keep
from pipeline.record.results import Origin, Row, read_results, read_together, ready, run_names
from pipeline.record.terminal import table


def top1(
    value: float, model="step 10", step: int | None = 10, stderr: float | None = 0.01, better: Any = "higher", **about
) -> list[Row]:
    """One row; the weights are another's when the model is."""
    known = {"weights": f"w{model}", "evaluation": "knn", "settings": {"k": [20]}, "data": {"test": "m" * 32}}
    origin = Origin(model=model, step=step, **{**known, **about})
    return found([Number("knn/top1", value, 100, "val", stderr, better)], origin).rows


def add(folder, rows: list[Row]) -> None:
    """A record for each row."""
    for r in rows:
        about = (r.model, r.step, r.weights, r.evaluation, r.settings, r.manifests, r.seed, r.version)
        keep(folder, [Number(r.metric, r.value, r.n, r.split, r.stderr, r.better)], Origin(*about))


def read(folder) -> list[Row]:
    return read_results(folder).rows


def old(value: float, model="step 10", step: int | None = 10) -> Row:
    """As the first version of the file has it."""
    (row,) = top1(value, model, step)
    return replace(row, weights="", settings={}, config="c" * 32, manifests={"train": "t" * 32, "val": "m" * 32})


def test_rows_carry_their_origin():
    (row,) = top1(0.5, seed=3)
    assert (row.model, row.step, row.evaluation, row.metric) == ("step 10", 10, "knn", "knn/top1")
    assert (row.value, row.n, row.split, row.stderr, row.better) == (0.5, 100, "val", 0.01, "higher")
    assert row.manifests == {"test": "m" * 32} and row.settings == {"k": [20]} and row.time.endswith("+00:00")
    assert (row.weights, row.seed) == ("wstep 10", 3)


OTHERS = {
    "weights": {"weights": "another"},
    "settings": {"settings": {"k": [20], "temperature": 0.1}},
    "data": {"data": {"test": "n" * 32}},
    "seed": {"seed": 1},
    "protocol": {"version": 2},
}


@pytest.mark.parametrize("what", OTHERS)
def test_numbers_of_another_identity_are_kept_beside_each_other(tmp_path, what):
    add(tmp_path, top1(0.5))
    add(tmp_path, top1(0.6, **OTHERS[what]))
    assert [row.value for row in read(tmp_path)] == [0.5, 0.6]
    add(tmp_path, top1(0.7))  # the first one's again, under another name
    add(tmp_path, top1(0.8, "best", 10, weights="wstep 10"))
    assert [row.value for row in read(tmp_path)] == [0.6, 0.8]
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_a_file_of_the_first_version_is_read_and_left_alone(tmp_path):
    new = (
        "weights",
        "settings",
        "seed",
        "version",
        "subject",
        "data_name",
        "data_names",
        "group",
        "record",
        "outcomes",
    )
    listed = [{k: v for k, v in asdict(old(*a)).items() if k not in new} for a in [(0.5,), (0.1, "random init", None)]]
    (tmp_path / "results.json").write_text(json.dumps({"version": 1, "results": listed}))
    before = (tmp_path / "results.json").read_bytes()
    assert [row.value for row in read(tmp_path)] == [0.5, 0.1]
    assert models(read(tmp_path)) == ["random init", "step 10"]
    add(tmp_path, top1(0.6))
    assert [(row.model, row.value) for row in read(tmp_path)] == [("random init", 0.1), ("step 10", 0.6)]
    assert (tmp_path / "results.json").read_bytes() == before


def test_where_results_cannot_be_written_is_known_before(tmp_path):
    ready(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").rglob("*")) == [tmp_path / "new" / "folder" / "results"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write results into .*file \(.*\); .*--out FOLDER"):
        ready(tmp_path / "file")


def test_a_newer_row_replaces_one_of_the_same_key_only(tmp_path):
    assert read(tmp_path) == []
    add(tmp_path, top1(0.5) + top1(0.1, "random init", None))
    other_split = [replace(row, split="train") for row in top1(0.9, data={"test": "t" * 32})]
    add(tmp_path, top1(0.6) + other_split)
    values = {(r.model, r.split): r.value for r in read(tmp_path)}
    assert values == {("step 10", "val"): 0.6, ("random init", "val"): 0.1, ("step 10", "train"): 0.9}


def test_values_that_are_not_finite_survive_strict_json(tmp_path):
    add(tmp_path, top1(math.inf, stderr=math.nan))

    def refuse(literal):
        raise AssertionError(literal)

    (record,) = (tmp_path / "results").iterdir()
    json.loads(record.read_text(), parse_constant=refuse)
    (row,) = read(tmp_path)
    assert row.value == math.inf and row.stderr is not None and math.isnan(row.stderr)


def test_processes_that_evaluate_at_once_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: add(tmp_path, top1(0.5, f"step {step}", step)), range(24)))
    assert len(read(tmp_path)) == 24


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "results": [{"model": 1}]}', '{"version": 9}'])
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    add(tmp_path, top1(0.5))
    (sentence,) = read_results(tmp_path).damaged
    assert str(tmp_path / "results.json") in sentence and [row.value for row in read(tmp_path)] == [0.5]


def test_baselines_come_first_then_checkpoints_by_step():
    several = top1(0.1, "step 100", 100) + top1(0.1, "step 20", 20) + top1(0.1, "random init", None)
    assert models(several) == ["random init", "step 20", "step 100"]


@pytest.mark.parametrize(("better", "best"), [("higher", 0.7), ("lower", 0.2), (None, None)])
def test_the_best_of_a_line_follows_the_metric(better, best):
    several = [top1(v, f"step {i}", i, better=better)[0] for i, v in enumerate([0.2, 0.7, math.nan])]
    (line,) = lines(several)
    assert line.best == best


def test_one_model_alone_is_not_the_best():
    (line,) = lines(top1(0.5))
    assert line.best is None


def test_unlike_things_do_not_share_a_line_and_say_what_they_differ_in():
    (line,) = lines(top1(0.5) + top1(0.6, "step 20", 20))
    assert (line.name, line.best) == ("knn/top1", 0.6)
    first, second = lines(top1(0.5) + top1(0.6, "step 20", 20, data={"test": "n" * 32}))
    assert (first.name, second.name) == ("knn/top1 [test data=mmmmmm]", "knn/top1 [test data=nnnnnn]")
    assert first.best is None and [c and c.value for c in second.cells] == [None, 0.6]
    warm = {"k": [20], "temperature": 0.1, "image": {"size": 64}}
    cold = {"k": [20], "temperature": 0.07, "image": {"size": 64}}
    first, second = lines(top1(0.5, settings=warm) + top1(0.6, settings=cold))
    assert (first.name, second.name) == ("knn/top1 [temperature=0.1]", "knn/top1 [temperature=0.07]")
    first, second = lines(top1(0.5, seed=0) + top1(0.6, "step 20", 20, seed=1))
    assert (first.name, second.name) == ("knn/top1 [seed=0]", "knn/top1 [seed=1]")
    assert len(lines([old(0.5), *top1(0.6, "step 20", 20)])) == 2


def test_data_sets_are_told_apart_by_what_the_suite_calls_them_and_trials_always():
    def named(name: str, mark: str, **about: Any) -> Row:
        return replace(top1(0.5, data={"test": mark * 32}, **about)[0], data_name=name)

    first, second = lines([named("cifar", "m"), named("dtd", "n")])
    assert [(line.name, line.data) for line in (first, second)] == [("knn/top1", "cifar"), ("knn/top1", "dtd")]
    first, second = lines([named("cifar", "m"), named("cifar", "n")])
    assert (first.name, second.name) == ("knn/top1 [test data=mmmmmm]", "knn/top1 [test data=nnnnnn]")
    (line,) = lines([named("cifar", "m", settings={"k": [20], "limit": 100})])
    assert line.name == "knn/top1 [limit=100]"


def test_one_name_of_several_weights_is_several_columns():
    again = top1(0.5) + top1(0.6, weights="7c9e6679aa") + top1(0.7, "step 20", 20)
    assert models(again) == ["step 10 (wstep )", "step 10 (7c9e66)", "step 20"]
    (line,) = lines(again)
    assert [c and c.value for c in line.cells] == [0.5, 0.6, 0.7]


def printed(results: list[Row]) -> str:
    stream = io.StringIO()
    table(results, stream)
    return stream.getvalue()


def test_the_table_in_a_log():
    text = printed(top1(0.5) + top1(0.12345, "random [init]", None) + top1(0.9, "step 20", 20, stderr=None))
    head, _, body = [line for line in text.splitlines() if line.strip()]
    assert head.split() == ["metric", "data", "random", "[init]", "step", "10", "step", "20"]
    assert body.split() == ["knn/top1", "val", "0.123", "+-", "0.010", "0.500", "+-", "0.010", "0.900"]


def test_the_table_names_the_data_sets_that_tell_its_lines_apart():
    def on(name: str) -> list[Row]:
        return [replace(row, data_name=name) for row in top1(0.5, data={"test": name})]

    body = [line.split()[:2] for line in printed(on("cifar10") + on("dtd")).splitlines() if "knn" in line]
    assert body == [["knn/top1", "cifar10"], ["knn/top1", "dtd"]]


def test_a_missing_cell_is_empty():
    other = [replace(row, metric="knn/top5") for row in top1(0.9, "step 20", 20, stderr=None)]
    (first, second) = [line.texts() for line in lines(top1(0.5) + other)]
    assert first == ["0.500 +- 0.010", ""] and second == ["", "0.9000"]


def test_what_lies_orders_of_magnitude_apart_is_written_each_for_itself():
    """Chosen strengths, of which none has an error: rounded as the largest is, the smallest would be 0."""
    (line,) = lines(top1(0.05882, stderr=None) + top1(5882.35, "step 20", 20, stderr=None))
    assert line.texts() == ["0.05882", "5882"]
    (line,) = lines(top1(0.05882) + top1(5882.35, "step 20", 20))
    assert line.texts() == ["0.059 +- 0.010", "5882.350 +- 0.010"]
    (line,) = lines(top1(0.0, stderr=None) + top1(9.0, "step 20", 20, stderr=None))
    assert line.texts() == ["0.000", "9.000"]


def test_settings_are_told_with_the_digits_that_a_person_reads():
    def cropped(fraction: float, model: str) -> list[Row]:
        return top1(0.5, model, settings={"crop_fraction": fraction})

    first, second, third = lines(cropped(28 / 31, "a") + cropped(1.0, "b") + cropped(1e-5, "c"))
    assert first.name == "knn/top1 [crop_fraction=0.903226]" and second.name == "knn/top1 [crop_fraction=1.0]"
    assert third.name == "knn/top1 [crop_fraction=1e-05]"


def test_runs_stand_side_by_side_and_are_told_apart(tmp_path):
    short, long, empty = (tmp_path / name for name in ("short", "long", "empty"))
    for folder, value in ((short, 0.5), (long, 0.7)):
        folder.mkdir()
        add(folder, top1(value) + top1(0.1, "random init", None))
    together = read_together([str(short), str(long)]).rows
    assert models(together) == ["short: random init", "long: random init", "short: step 10", "long: step 10"]
    (line,) = lines(together)
    assert [c.value for c in line.measured] == [0.1, 0.1, 0.5, 0.7] and line.best == 0.7
    with pytest.raises(ConfigError, match="empty has no results"):
        read_together([str(short), str(empty)])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name, value in (("a/mae", 0.5), ("b/mae", 0.7)):
        (tmp_path / name).mkdir(parents=True)
        add(tmp_path / name, top1(value))
    together = read_together([str(tmp_path / "a/mae"), str(tmp_path / "b/mae"), str(tmp_path / "b/../b/mae")]).rows
    assert models(together) == ["a/mae: step 10", "b/mae: step 10"]
    assert run_names(["x/a", "y/a", "z/b"]) == {"x/a": "x/a", "y/a": "y/a", "z/b": "b"}
    assert run_names(["runs/a/mae", "runs/b/mae"]) == {"runs/a/mae": "a/mae", "runs/b/mae": "b/mae"}
