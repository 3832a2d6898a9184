"""Records: what each sample adds comes back, and nothing that is damaged or foreign is taken for a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Figure, Number
from pipeline.record.outputs import keep
from pipeline.record.records import About, outcomes, read_record, whole
from pipeline.record.results import Origin, read_results

ORIGIN = Origin("step 3", 3, "w", "knn", {"k": [20]}, {"test": "m"}, 7)
HITS = np.arange(1003) % 3 == 0
LOSSES = np.linspace(0, 1, 1003, dtype=np.float32)
SOURCES = np.arange(1003) // 5


def numbers(**about: Any) -> list[Number]:
    own = {"samples": HITS, "sources": SOURCES} | about
    return [
        Number("knn/top1", float(HITS.mean()), 1003, "val", 0.01, **own),
        Number("knn/loss", float(LOSSES.mean()), 1003, "val", samples=LOSSES),
        Number("knn/again", float(HITS.mean()), 1003, "val", samples=~HITS, sources=SOURCES),
        Number("knn/none", 0.5, 1003, "val"),
    ]


def write(folder: Path) -> Path:
    keep(folder, [*numbers(), Figure("map", np.zeros((2, 3, 3), np.uint8), "", "val")], ORIGIN, About(code="c"))
    return folder / "results" / f"{ORIGIN.name}.json"


def test_what_each_sample_adds_comes_back_and_takes_little_room(tmp_path):
    write(tmp_path)
    top1, loss, again, none = read_results(tmp_path).rows
    assert none.outcomes is None
    for row, values, sources in ((top1, HITS, SOURCES), (loss, LOSSES, None), (again, ~HITS, SOURCES)):
        assert row.outcomes is not None
        kept = outcomes(row.outcomes, row.n)
        assert kept.values.dtype == values.dtype and np.array_equal(kept.values, values)
        assert (kept.sources is None) == (sources is None)
        assert sources is None or (kept.sources is not None and np.array_equal(kept.sources, sources))
    keep(tmp_path, numbers()[:1], ORIGIN)
    (file,) = (tmp_path / "results").glob("*.npz")
    with np.load(file) as arrays:
        assert sorted(arrays) == ["sources1", "values0"] and len(arrays["values0"]) == 126


def test_the_same_is_written_as_the_same_bytes(tmp_path):
    def files(folder: Path) -> dict[str, bytes]:
        write(folder)
        return {p.name: p.read_bytes() for p in (folder / "results").iterdir() if p.suffix != ".json"}

    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 2


def test_outcomes_of_another_number_of_samples_are_a_mistake_of_the_evaluation(tmp_path):
    for wrong in ({"samples": HITS[:-1], "sources": None}, {"sources": SOURCES[:-1]}):
        with pytest.raises(AssertionError, match="knn/top1 has 1003 samples"):
            keep(tmp_path, numbers(**wrong), ORIGIN)
    assert not (tmp_path / "results").exists()


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "no table": lambda path: path.write_text("[]"),
    "another digit": lambda path: path.write_text(path.read_text().replace('"n": 1003', '"n": 1004', 1)),
    "no digest": lambda path: path.write_text(json.dumps({"version": 4, "numbers": []})),
    "a later program": lambda path: path.write_text(json.dumps({"version": 5})),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_and_the_others_are_read(damage, tmp_path):
    path = write(tmp_path)
    keep(tmp_path, [Number("few/top1", 0.5, 3, "val")], Origin("step 3", 3, "w", "few", {}, {}))
    DAMAGE[damage](path)
    results = read_results(tmp_path)
    assert [row.metric for row in results.rows] == ["few/top1"]
    (sentence,) = results.damaged
    assert str(path) in sentence
    with pytest.raises(DataError, match=path.name):
        whole(tmp_path, ORIGIN.name)


@pytest.mark.parametrize("suffix", [".npz", "-0-map.png"])
@pytest.mark.parametrize("damage", ["gone", "another byte"])
def test_a_record_is_whole_with_all_that_lies_beside_it(tmp_path, suffix, damage):
    path = write(tmp_path)
    assert whole(tmp_path, ORIGIN.name) == read_record(path) and whole(tmp_path, "knn-nothing") is None
    beside = path.with_name(path.stem + suffix)
    data = beside.read_bytes()
    beside.unlink()
    if damage == "another byte":
        beside.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(DataError, match=beside.name):
        whole(tmp_path, ORIGIN.name)
    results = read_results(tmp_path)
    assert len(results.rows) == 4 and results.damaged == ()
    if suffix == ".npz":
        with pytest.raises(DataError, match=beside.name):
            outcomes(results.rows[0].outcomes, 1003)


def test_a_record_tells_who_made_it(tmp_path):
    about = About("runs/mae", "glyphs", 3, "cifar", {"test": "shards/val"}, "", "c0de", 1.25)
    keep(tmp_path, numbers(), ORIGIN, about)
    record = read_record(tmp_path / "results" / f"{ORIGIN.name}.json")
    assert record.about == about and record.origin == ORIGIN
    assert {"sluice", "torch", "timm"} <= record.body["versions"].keys() and record.body["python"].count(".") == 2
    assert {"commit", "dirty"} <= record.body.keys()
    row = read_results(tmp_path).rows[0]
    assert (row.subject, row.data_name, row.data_names) == ("runs/mae", "cifar", {"test": "shards/val"})
