import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Number
from pipeline.record.results import Row, add_results, lines, models, read_results, read_together, rows, table

ABOUT = {"evaluation": "knn", "config": "c" * 32, "manifests": {"val": "m" * 32}}


def top1(
    value: float, model="step 10", step: int | None = 10, stderr: float | None = 0.01, better: Any = "higher", **about
) -> list[Row]:
    return rows([Number("knn/top1", value, 100, "val", stderr, better)], model=model, step=step, **{**ABOUT, **about})


def test_rows_carry_their_origin():
    (row,) = top1(0.5)
    assert (row.model, row.step, row.evaluation, row.metric) == ("step 10", 10, "knn", "knn/top1")
    assert (row.value, row.n, row.split, row.stderr, row.better) == (0.5, 100, "val", 0.01, "higher")
    assert row.config == "c" * 32 and row.manifests == {"val": "m" * 32} and row.time.endswith("+00:00")


def test_a_newer_row_replaces_one_of_the_same_key_only(tmp_path):
    assert read_results(tmp_path) == []
    add_results(tmp_path, top1(0.5) + top1(0.1, "random init", None))
    other_split = rows([Number("knn/top1", 0.9, 100, "train")], model="step 10", step=10, **ABOUT)
    add_results(tmp_path, top1(0.6) + other_split)
    found = {(r.model, r.split): r.value for r in read_results(tmp_path)}
    assert found == {("step 10", "val"): 0.6, ("random init", "val"): 0.1, ("step 10", "train"): 0.9}


def test_values_that_are_not_finite_survive_strict_json(tmp_path):
    add_results(tmp_path, top1(math.inf, stderr=math.nan))

    def refuse(literal):
        raise AssertionError(literal)

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    (row,) = read_results(tmp_path)
    assert row.value == math.inf and row.stderr is not None and math.isnan(row.stderr)


def test_processes_that_evaluate_at_once_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: add_results(tmp_path, top1(0.5, f"step {step}", step)), range(24)))
    assert len(read_results(tmp_path)) == 24


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1, "results": [{"model": 1}]}', '{"version": 9}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(tmp_path)


def test_baselines_come_first_then_checkpoints_by_step():
    found = top1(0.1, "step 100", 100) + top1(0.1, "step 20", 20) + top1(0.1, "random init", None)
    assert models(found) == ["random init", "step 20", "step 100"]


@pytest.mark.parametrize(("better", "best"), [("higher", 0.7), ("lower", 0.2), (None, None)])
def test_the_best_of_a_line_follows_the_metric(better, best):
    found = [top1(v, f"step {i}", i, better=better)[0] for i, v in enumerate([0.2, 0.7, math.nan])]
    (line,) = lines(found)
    assert line.best == best


def test_one_model_alone_is_not_the_best():
    (line,) = lines(top1(0.5))
    assert line.best is None


def test_lines_with_unlike_data_or_settings_are_marked():
    (line,) = lines(top1(0.5) + top1(0.6, "step 20", 20))
    assert line.comparable
    (line,) = lines(top1(0.5) + top1(0.6, "step 20", 20, manifests={"val": "n" * 32}))
    assert not line.comparable
    (line,) = lines(top1(0.5) + top1(0.6, "step 20", 20, config="d" * 32))
    assert not line.comparable


def printed(results: list[Row]) -> str:
    stream = io.StringIO()
    table(results, stream)
    return stream.getvalue()


def test_the_table_in_a_log():
    text = printed(
        top1(0.5) + top1(0.12345, "random [init]", None, manifests={}) + top1(0.9, "step 20", 20, stderr=None)
    )
    head, _, body, caption = [line for line in text.splitlines() if line.strip()]
    assert head.split() == ["metric", "split", "random", "[init]", "step", "10", "step", "20"]
    assert body.split() == ["knn/top1", "*", "val", "0.123", "+-", "0.010", "0.500", "+-", "0.010", "0.900"]
    assert "different data" in caption


def test_a_missing_cell_is_empty():
    other = rows([Number("knn/top5", 0.9, 100, "val")], model="step 20", step=20, **ABOUT)
    (first, second) = [line.texts() for line in lines(top1(0.5) + other)]
    assert first == ["0.500 +- 0.010", ""] and second == ["", "0.9000"]


def test_runs_stand_side_by_side_and_are_told_apart(tmp_path):
    short, long, empty = (tmp_path / name for name in ("short", "long", "empty"))
    for folder, value in ((short, 0.5), (long, 0.7)):
        folder.mkdir()
        add_results(folder, top1(value) + top1(0.1, "random init", None))
    together = read_together([str(short), str(long)])
    assert models(together) == ["short: random init", "long: random init", "short: step 10", "long: step 10"]
    (line,) = lines(together)
    assert [c.value for c in line.measured] == [0.1, 0.1, 0.5, 0.7] and line.best == 0.7 and line.comparable
    with pytest.raises(ConfigError, match="empty has no results"):
        read_together([str(short), str(empty)])
