"""Tables of sweeps in READMEs are those of the records, and their intervals are Student's of paired seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from datetime import date

import pytest

from tests import tables
from tests.records import RecordError
from tests.tables import FOLDER, Column, Row, Table, collected, read_table, renewed, shown, write_table, written

RECORD = """
command = "sluice sweep x.toml"
commit = "1a2b3c4"
date = 2026-11-30
hardware = "two cores"
seeds = 3
baseline = "alone"
head = "loss"
[[columns]]
name = "knn/top1"
title = "kNN, %"
scale = 100.0
compared = true
[[columns]]
name = "parameters"
title = "parameters"
digits = 0
[rows.alone.values]
"knn/top1" = [0.50, 0.52, 0.48]
parameters = 12345
[rows."KL, T = 4"]
run = "kl"
note = "Hinton et al."
[rows."KL, T = 4".values]
"knn/top1" = [0.61, 0.62, 0.60]
[rows.hint.values]
"knn/top1" = [0.52, nan, 0.48]
parameters = 13000
"""


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECORD)
    return path


def test_tables_are_those_of_the_records():
    for path in written():
        text = path.read_text(encoding="utf-8")
        assert renewed(text) == text, f"{path}: python -m tests.figures writes it anew"


def test_every_record_is_sound_and_shown_somewhere():
    shown_in = {found["name"] for path in written() for found in tables.BLOCK.finditer(path.read_text())}
    for path in FOLDER.glob("*.toml"):
        assert re.fullmatch(r"[0-9a-f]{7,40}", read_table(path).origin["commit"])
        assert path.stat().st_size < 500_000
        assert path.stem in shown_in, f"no README shows {path.name}"


def test_a_table_shows_means_and_paired_intervals(record):
    lines = shown(read_table(record)).split("\n")
    assert lines[0] == "| loss | kNN, % | less alone | parameters |  |"
    assert lines[1] == "|---|--:|--:|--:|---|"
    assert lines[2] == "| alone | 50.0 +- 1.2 |  | 12,345 |  |"
    # By hand: differences 11, 10, 12; t(2) at 97.5 % is 4.3027; its half width 4.3027 * 1 / sqrt(3).
    half = 4.302653 * statistics.stdev([11, 10, 12]) / math.sqrt(3)
    assert lines[3] == (
        f"| KL, T = 4 | 61.0 +- 0.6 | **+11.0 [+{11 - half:.1f}, +{11 + half:.1f}]** | - | Hinton et al. |"
    )
    # Seed 1 is not there: the pairs are 2 and 0 of seeds 0 and 2; t(1) at 97.5 % is 12.706.
    half = 12.7062 * statistics.stdev([2, 0]) / math.sqrt(2)
    assert lines[4] == (f"| hint | 50.0 +- 2.0 (2 of 3 seeds) | +1.0 [{1 - half:.1f}, +{1 + half:.1f}] | 13,000 |  |")
    assert lines[6].startswith("`sluice sweep x.toml` at 1a2b3c4, 2026-11-30, two cores; 3 seeds")


def test_one_seed_has_no_interval(tmp_path):
    record = tmp_path / "one.toml"
    record.write_text(re.sub(r"\[(0\.\d+|nan), .*\]", r"[\1]", RECORD.replace("seeds = 3", "seeds = 1")))
    text = shown(read_table(record))
    assert "| KL, T = 4 | 61.0 | +11.0 | - |" in text and "interval" not in text


def test_a_drift_is_seen_and_mended(record):
    page = "before\n<!-- table: mine -->\n| typed | 9 |\n<!-- end of table -->\nafter\n"
    new = renewed(page, record.parent)
    assert new != page and "KL, T = 4" in new and "typed" not in new
    assert renewed(new, record.parent) == new
    with pytest.raises(RecordError, match=r"no record other\.toml"):
        renewed(page.replace("mine", "other"), record.parent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('commit = "1a2b3c4"\n', ""), "commit"),
        (("seeds = 3", "seeds = 3\nwrong = 1"), "wrong"),
        (("seeds = 3", "seeds = 4"), "alone: 3 of 'knn/top1', not 4"),
        (('baseline = "alone"', 'baseline = "none"'), "no row is called 'none'"),
        (('baseline = "alone"\n', ""), "no row is the baseline"),
        (('name = "parameters"', 'name = "latency"'), "has 'parameters'"),
        (("digits = 0", "digit = 0"), "digit"),
        (("digits = 0", 'mean = ["kNN, %"]'), "a name or the mean of others"),
        (('name = "parameters"', 'mean = ["elsewhere"]'), "a name or the mean of others"),
    ],
)
def test_a_record_that_is_not_sound_is_refused(record, change, said):
    record.write_text(RECORD.replace(*change))
    with pytest.raises(RecordError, match=re.escape(said)):
        read_table(record)


def test_what_runs_gave_is_taken_over(tmp_path, record):
    sweep = tmp_path / "sweep"
    for run, seed, value in (("kl", 0, 0.7), ("kl", 2, 0.9), ("alone", 1, 0.3), ("other", 0, 0.1)):
        folder = sweep / f"{run},seed={seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "knn/top1": value}) + "\n")
    table = collected(read_table(record), [sweep])
    found = {row.title: row.values for row in table.rows}
    assert found["KL, T = 4"]["knn/top1"] == pytest.approx([0.7, math.nan, 0.9], nan_ok=True)
    assert found["alone"]["knn/top1"] == pytest.approx([math.nan, 0.3, math.nan], nan_ok=True)
    assert found["alone"]["parameters"] == 12345 and repr(found["hint"]["knn/top1"]) == "[0.52, nan, 0.48]"
    write_table(record, table)
    again = read_table(record)
    assert [row.title for row in again.rows] == ["alone", "KL, T = 4", "hint"] and again.columns == table.columns
    assert again.rows[1].run == "kl" and repr(again.rows[1].values) == repr(table.rows[1].values)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)  # trained once: it stands beside every seed's student
    (tmp_path / "runs" / "teacher" / "metrics.jsonl").write_text(json.dumps({"step": 3, "knn/top1": 0.9}) + "\n")
    both = Table(table.origin, table.columns, [*table.rows, Row("Teacher", {}, "teacher")], "alone")
    assert collected(both, [sweep, tmp_path / "runs"]).rows[-1].values == {"knn/top1": 0.9}
    lacking = Table(table.origin, [Column("knn/top1", "kNN")], [Row("mine", {})])
    with pytest.raises(RecordError, match=r"mine: no run called 'mine' has the columns; there are alone, kl, other"):
        collected(lacking, [sweep])


def test_columns_may_be_of_other_runs_and_means_of_columns(tmp_path):
    """As a sweep of sweeps has it: a folder for each method, in it a run for each part and seed."""
    values = {("a", "10"): (0.1, 0.2), ("a", "20"): (0.4, 0.6), ("b", "10"): (0.3, 0.5), ("b", "20"): (0.6, 0.7)}
    for (method, part), seeds in values.items():
        for seed, value in enumerate(seeds):
            folder = tmp_path / method / f"{part},seed={seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "top1": value}) + "\n")
    (tmp_path / "c" / "seed=1").mkdir(parents=True)
    (tmp_path / "c" / "seed=1" / "metrics.jsonl").write_text(json.dumps({"step": 3, "top1": 0.9}) + "\n")
    origin = {"command": "c", "commit": "1a2b3c4", "date": date(2026, 11, 30), "hardware": "h", "seeds": 2}
    parts = [Column("top1", f"{part} labels", digits=2, run=f"/{part}") for part in (10, 20)]
    mean = Column(title="mean", digits=3, mean=("10 labels", "20 labels"), compared=True)
    rows = [Row("first", {}, "a"), Row("second", {}, "b"), Row("third", {"top1/10": [0.0, 0.0]}, "c")]
    table = collected(Table(origin, [*parts, mean], rows, "first"), [tmp_path])
    write_table(tmp_path / "again.toml", table)
    lines = shown(read_table(tmp_path / "again.toml")).split("\n")
    assert lines[0] == "|  | 10 labels | 20 labels | mean | less first |"
    # By hand: means of both parts by seed are 0.25, 0.4 and 0.45, 0.6; the differences are 0.2 both times.
    assert lines[2] == "| first | 0.15 +- 0.05 | 0.50 +- 0.10 | 0.325 +- 0.075 |  |"
    assert lines[3] == "| second | 0.40 +- 0.10 | 0.65 +- 0.05 | 0.525 +- 0.075 | **+0.200 [+0.200, +0.200]** |"
    assert lines[4] == "| third | 0.00 +- 0.00 | - | - | - |"
    whole = collected(Table(origin, [Column("top1", "top-1")], [Row("third", {}, "c")]), [tmp_path])
    assert repr(whole.rows[0].values) == "{'top1': [nan, 0.9]}"
