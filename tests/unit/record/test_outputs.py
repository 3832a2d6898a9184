"""Tables and figures of evaluations, as they are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Figure, Number, Output, Table
from pipeline.record.lines import found_text, whole_text
from pipeline.record.outputs import found, keep
from pipeline.record.results import FILE, Origin, Results, read_results

ABOUT: dict[str, Any] = {"evaluation": "zero_shot", "settings": {"k": [20]}, "data": {"test": "m" * 32}}


def add(folder: Path, *outputs: Output, model: str = "step 10", **about: Any) -> Results:
    new = found(outputs, Origin(**{"model": model, "step": 10, "weights": f"w{model}", **ABOUT, **about}))
    keep(folder, outputs, new)
    return new


def recall(*rows: tuple[str | int | float | None, ...]) -> Table:
    return Table("zero_shot/classes", ("class", "images", "recall"), rows, "val")


def map_of(gray: int) -> Figure:
    return Figure("map/classes", np.full((3, 5, 3), gray, np.uint8), f"gray {gray}", "val")


def grays(folder: Path) -> dict[str, int]:
    """Caption to what its picture shows."""
    return {f.caption: int(np.asarray(Image.open(folder / f.file))[2, 4, 1]) for f in read_results(folder).figures}


def test_all_three_kinds_come_back_with_their_origin(tmp_path):
    number = Number("zero_shot/top1", 0.5, 100, "val")
    add(tmp_path, recall(("a", 3, 0.25), ("b", 1, None)), number, map_of(7), seed=4)
    (row,), (table,), (figure,) = read_results(tmp_path)
    assert (table.columns, table.rows) == (["class", "images", "recall"], [["a", 3, 0.25], ["b", 1, None]])
    assert (table.metric, figure.metric, row.value) == ("zero_shot/classes", "map/classes", 0.5)
    for one in (row, table, figure):
        assert (one.model, one.step, one.evaluation, one.split) == ("step 10", 10, "zero_shot", "val")
        assert (one.weights, one.settings, one.manifests, one.seed) == ("wstep 10", {"k": [20]}, {"test": "m" * 32}, 4)
        assert one.config == row.config and one.time.endswith("+00:00")
    with Image.open(tmp_path / figure.file) as file:
        assert file.format == "PNG"
    assert grays(tmp_path) == {"gray 7": 7}


OTHERS = {
    "weights": {"weights": "another"},
    "settings": {"settings": {"k": [20], "temperature": 0.1}},
    "data": {"data": {"test": "n" * 32}},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("what", OTHERS)
def test_of_the_same_identity_the_newer_one_is_kept_and_another_stands_beside_it(tmp_path, what):
    add(tmp_path, recall(("a", 1, 0.1)), map_of(1))
    add(tmp_path, recall(("a", 1, 0.2)), map_of(2), **OTHERS[what])
    add(tmp_path, recall(("a", 1, 0.3)), map_of(3), model="best", weights="wstep 10")
    assert [table.rows for table in read_results(tmp_path).tables] == [[["a", 1, 0.3]], [["a", 1, 0.2]]]
    assert grays(tmp_path) == {"gray 3": 3, "gray 2": 2}
    assert len(list((tmp_path / "figures").iterdir())) == 2


def test_names_of_figures_stay_inside_the_folder(tmp_path):
    for name in ("../../up", "/etc/passwd", ".hidden", "a b/<c>", "x" * 300, "\u00fcber/karte"):
        add(tmp_path, map_of(1)._replace(name=name))
    files = [f.file for f in read_results(tmp_path).figures]
    assert len(set(files)) == 6 and all((tmp_path / file).is_file() for file in files)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(f.removeprefix("figures/") for f in files)
    assert not any(f.startswith("figures/.") for f in files)


def test_text_that_looks_like_a_number_stays_text_and_the_file_is_strict_json(tmp_path):
    add(tmp_path, recall(("NaN", 1, math.nan), ("Infinity", 1, math.inf)))
    add(tmp_path, map_of(1))  # written again

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert read_results(tmp_path).tables[0].rows == [["NaN", 1, "NaN"], ["Infinity", 1, "Infinity"]]


def test_a_file_of_the_second_version_is_read_and_renewed(tmp_path):
    add(tmp_path, Number("zero_shot/top1", 0.5, 100, "val"))
    body = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({"version": 2, "results": body["results"]}))
    assert read_results(tmp_path).tables == [] and read_results(tmp_path).rows[0].value == 0.5
    add(tmp_path, recall(("a", 1, 0.1)))
    after = read_results(tmp_path)
    assert (len(after.rows), len(after.tables), json.loads((tmp_path / FILE).read_text())["version"]) == (1, 1, 3)


@pytest.mark.parametrize("change", [{"tables": [{"name": 1}]}, {"figures": 3}, {"figures": [{}]}])
def test_damage_is_named(tmp_path, change):
    (tmp_path / FILE).write_text(json.dumps({"version": 3, "results": []} | change))
    with pytest.raises(DataError, match=r"results\.json"):
        read_results(tmp_path)


def test_a_picture_that_cannot_be_written_changes_nothing(tmp_path):
    add(tmp_path, recall(("a", 1, 0.1)), map_of(1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "figures").rename(tmp_path / "kept")
    (tmp_path / "figures").write_text("")
    with pytest.raises(OSError):
        add(tmp_path, recall(("a", 1, 0.2)), map_of(2))
    (tmp_path / "figures").unlink()
    (tmp_path / "kept").rename(tmp_path / "figures")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_terminal_is_told_where_they_are(tmp_path):
    new = add(tmp_path, Number("zero_shot/top1", 0.5, 100, "val"), recall(("[a]", 1, 0.1), ("b", 2, None)), map_of(1))
    assert found_text(tmp_path, new).splitlines() == [
        f"table zero_shot/classes on val, 2 rows: {tmp_path / FILE}",
        f"figure map/classes on val: {tmp_path / new.figures[0].file}",
    ]
    assert found_text(tmp_path, Results(new.rows, [], [])) == ""
    words = whole_text(new.tables[0]).split()
    assert words[:5] == ["zero_shot/classes", "on", "val,", "step", "10"]
    assert [w for w in words if w[0] not in "\u2500-"][5:] == ["class", "images", "recall", "[a]", "1", "0.1", "b", "2"]
