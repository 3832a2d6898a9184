"""Tables and figures of evaluations, as they are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.core.evaluation import Figure, Number, Output, Table
from pipeline.record.outputs import keep
from pipeline.record.results import EARLIER, Origin, Results, read_results
from pipeline.record.terminal import found_text, whole_text

ABOUT: dict[str, Any] = {"evaluation": "zero_shot", "settings": {"k": [20]}, "data": {"test": "m" * 32}}


def add(folder: Path, *outputs: Output, model: str = "step 10", **about: Any) -> Results:
    return keep(folder, outputs, Origin(**{"model": model, "step": 10, "weights": f"w{model}", **ABOUT, **about}))


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
    (row,), (table,), (figure,), damaged, failed = read_results(tmp_path)
    assert damaged == failed == ()
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
    assert [table.rows for table in read_results(tmp_path).tables] == [[["a", 1, 0.2]], [["a", 1, 0.3]]]
    assert grays(tmp_path) == {"gray 3": 3, "gray 2": 2}
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [".json", ".json", ".png", ".png"]


def test_names_of_figures_stay_inside_the_folder(tmp_path):
    names = ("../../up", "/etc/passwd", ".hidden", "a b/<c>", "x" * 300, "\u00fcber/karte")
    add(tmp_path, *(map_of(1)._replace(name=name) for name in names))
    files = [f.file for f in read_results(tmp_path).figures]
    assert len(set(files)) == 6 and all((tmp_path / file).is_file() for file in files)
    pictures = sorted(p.name for p in (tmp_path / "results").glob("*.png"))
    assert pictures == sorted(f.removeprefix("results/") for f in files)


def test_pictures_of_an_earlier_time_do_not_stay(tmp_path):
    add(tmp_path, map_of(1), map_of(2)._replace(name="map/more"))
    add(tmp_path, map_of(3))
    assert grays(tmp_path) == {"gray 3": 3} and len(list((tmp_path / "results").iterdir())) == 2


def test_text_that_looks_like_a_number_stays_text_and_the_file_is_strict_json(tmp_path):
    add(tmp_path, recall(("NaN", 1, math.nan), ("Infinity", 1, math.inf)))

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    (record,) = (tmp_path / "results").iterdir()
    json.loads(record.read_text(), parse_constant=refuse)
    assert read_results(tmp_path).tables[0].rows == [["NaN", 1, "NaN"], ["Infinity", 1, "Infinity"]]


def earlier(**change: Any) -> str:
    """``results.json`` as the third version has it: a number, a table and a picture."""
    known = {"model": "step 10", "step": 10, "weights": "w", "evaluation": "zero_shot", "split": "val", "seed": None}
    known |= {"config": "c", "settings": {"k": 1}, "manifests": {"test": "m"}, "time": "2026-01-05T10:00:00+00:00"}
    number = known | {"metric": "zero_shot/top1", "value": "NaN", "n": 3, "stderr": None, "better": "higher"}
    table = known | {"metric": "zero_shot/classes", "columns": ["class"], "rows": [["a"]]}
    figure = known | {"metric": "map/classes", "caption": "gray 5"}
    return json.dumps({"version": 3, "results": [number], "tables": [table], "figures": [figure]} | change)


def test_files_of_the_second_and_third_version_are_read(tmp_path):
    (tmp_path / EARLIER).write_text(earlier())
    # As the program of that version has named it.
    (tmp_path / "figures").mkdir()
    Image.fromarray(map_of(5).image).save(tmp_path / "figures" / "map-classes-3493373e19c80e11.png")
    (row,), (table,), (figure,), damaged, _ = read_results(tmp_path)
    assert math.isnan(row.value) and table.rows == [["a"]] and damaged == () and grays(tmp_path) == {"gray 5": 5}
    assert {one.record for one in (row, table, figure)} == {"results.json"}
    body = json.loads(earlier())
    (tmp_path / EARLIER).write_text(json.dumps({"version": 2, "results": body["results"]}))
    add(tmp_path, recall(("a", 1, 0.1)))
    after = read_results(tmp_path)
    assert (len(after.rows), len(after.tables)) == (1, 1)


@pytest.mark.parametrize("change", [{"tables": [{"name": 1}]}, {"figures": 3}, {"figures": [{}]}])
def test_damage_of_an_earlier_file_is_named(tmp_path, change):
    (tmp_path / EARLIER).write_text(earlier(**change))
    (sentence,) = read_results(tmp_path).damaged
    assert "results.json is damaged" in sentence


def test_a_picture_that_cannot_be_written_changes_nothing(tmp_path):
    add(tmp_path, recall(("a", 1, 0.1)), map_of(1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (picture,) = (tmp_path / "results").glob("*.png")
    picture.unlink()
    picture.mkdir()
    with pytest.raises(OSError):
        add(tmp_path, recall(("a", 1, 0.2)), map_of(2))
    picture.rmdir()
    picture.write_bytes(before[picture])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_terminal_is_told_where_they_are(tmp_path):
    new = add(tmp_path, Number("zero_shot/top1", 0.5, 100, "val"), recall(("[a]", 1, 0.1), ("b", 2, None)), map_of(1))
    assert found_text(tmp_path, new).splitlines() == [
        f"table zero_shot/classes on val, 2 rows: {tmp_path / new.tables[0].record}",
        f"figure map/classes on val: {tmp_path / new.figures[0].file}",
    ]
    assert found_text(tmp_path, Results(new.rows, [], [])) == ""
    words = whole_text(new.tables[0]).split()
    assert words[:5] == ["zero_shot/classes", "on", "val,", "step", "10"]
    assert [w for w in words if w[0] not in "\u2500-"][5:] == ["class", "images", "recall", "[a]", "1", "0.1", "b", "2"]
