"""A model that reads takes its tokenizer with it: it is evaluated where no tokenizer and no caption is left."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from data_prep.tokenizer import train_tokenizer
from pipeline.core import manifest as manifests
from pipeline.record.results import read_results
from pipeline.run.__main__ import main
from tests.integration.runs import codes, overrides, run

SUITE = """
workers = 0
[streams]
val = "{val}"
[[evals]]
name = "zero_shot"
"""


@pytest.fixture(scope="module")
def clip(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(glyphs / "train", folder / "train")
    train_tokenizer(str(folder / "train"), 300)
    own = ["engine.name=accelerate", "run.length=2ba"]
    assert codes(run(1, "clip", overrides(folder / "run", folder / "train", *own))) == [0]
    return folder


def without_words(folder: Path) -> None:
    """A data set as one of labels alone is: no tokenizer, no captions."""
    whole = manifests.load(folder)
    fields = {name: ends for name, ends in whole.fields.items() if name in ("image", "label")}
    bare = manifests.Manifest(whole.root, whole.shards, fields, whole.classes, whole.statistics, whole.made)
    manifests.save(bare, folder)


BOTH = """
workers = 0
fields = ["image", "text", "texts"]
[streams]
val = "{val}"
[[evals]]
name = "retrieval"
[[evals]]
name = "retrieval"
field = "texts"
"""


def test_retrieval_by_all_captions_of_samples_that_have_one_is_that_by_one(clip, glyphs, tmp_path):
    (tmp_path / "suite.toml").write_text(BOTH.format(val=glyphs / "val"))
    command = ["eval", "--run", str(clip / "run"), "--suite", str(tmp_path / "suite.toml"), "--out", str(tmp_path)]
    assert main(command) == 0
    found: dict[str, dict[str, float]] = {"text": {}, "texts": {}}
    for row in read_results(tmp_path).rows:
        found[row.settings["field"]][row.metric] = row.value
    assert found["text"] == found["texts"] and "retrieval/top1_text" in found["text"]


def test_tables_that_the_disk_does_not_take_are_printed_whole(clip, glyphs, tmp_path, capsys, monkeypatch):
    def full(folder, outputs, origin, about):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.suites.running.keep", full)
    (tmp_path / "suite.toml").write_text(SUITE.format(val=glyphs / "val"))
    command = ["eval", "--run", str(clip / "run"), "--suite", str(tmp_path / "suite.toml"), "--out", str(tmp_path)]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "No space left on device" in said.err
    table = said.out.partition("zero_shot/classes on val")[2]
    assert all(f"{name}  " in table for name in manifests.load(glyphs / "val").classes)


def test_zero_shot_on_data_without_words_after_the_training_data_has_gone(clip, glyphs, tmp_path, capsys):
    shutil.copytree(glyphs / "val", tmp_path / "val")
    (tmp_path / "suite.toml").write_text(SUITE.format(val=tmp_path / "val"))
    evaluate = ["eval", "--run", str(clip / "run"), "--suite", str(tmp_path / "suite.toml")]
    assert main(evaluate) == 0
    found = read_results(clip / "run")
    (table,) = [table for table in found.tables if table.metric == "zero_shot/classes"]
    classes = manifests.load(tmp_path / "val").classes
    assert table.columns == ["class", "images", "recall"] and {row[0] for row in table.rows} <= set(classes)
    (mean,) = [row.value for row in found.rows if row.metric == "zero_shot/mean_per_class_recall"]
    assert sum(row[2] for row in table.rows) / len(table.rows) == pytest.approx(mean)
    assert f"table zero_shot/classes on val, {len(table.rows)} rows: " in capsys.readouterr().out
    assert "<h2>Tables</h2>" in (clip / "run" / "report.html").read_text()
    without_words(tmp_path / "val")
    shutil.rmtree(clip / "train")
    assert main([*evaluate, "--again"]) == 0
    after = read_results(clip / "run").rows
    values = [{row.metric: row.value for row in rows} for rows in (found.rows, after)]
    assert values[0] == values[1] and "zero_shot/top1" in values[0]
    capsys.readouterr()
    bad = tmp_path / "retrieval.toml"
    bad.write_text(SUITE.format(val=tmp_path / "val").replace("zero_shot", "retrieval"))
    assert main(["eval", "--run", str(clip / "run"), "--suite", str(bad)]) == 2
    assert "retrieval needs the field \"text\" of stream 'val'; add it" in capsys.readouterr().err
