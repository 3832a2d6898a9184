"""Which rows of a table are taken, and which classes their labels are."""

import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import build
from data_prep.labels import Known
from data_prep.options import Options
from data_prep.sources.table import Columns, TableSource
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import members, png
from tests.unit.data_prep.test_build import lines


def parquet(path, labels, names=None, **columns):
    """A table with images as bytes, with the classes' names where Hugging Face's datasets write them."""
    table = pa.table({"image": [png(i) for i in range(len(labels))], "label": labels, **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def built(path, out, known=None):
    """Classes, the label of each row (None: rejected), and the reasons of the rejects."""
    source = TableSource([path], Columns("image", label="label"), known=known or Known())
    manifest = build(source, out, Options({})).manifests["train"]
    content = members(out / "train")
    rows = [content.get(f"{i:09d}.cls") for i in range(pq.read_metadata(path).num_rows)]
    assert verify(str(out / "train"), decode=1).problems == {}
    return (
        manifest.classes,
        [None if r is None else int(r) for r in rows],
        [r["reason"] for r in lines(out / "rejects.jsonl")],
    )


@pytest.mark.parametrize(
    ("labels", "number", "reason"),
    [
        (pa.array([0, 1, 2, 10, -1]), 11, "label '-1' is no number of a class"),
        (pa.array(["0", "1", "2", "10", "0.00"]), 11, "label '0.00' is no number of a class"),
        (pa.array([0.0, 1.0, 2.0, 10.0, 0.5]), 11, "label '0.5' is no number of a class"),
        (pa.array([0, 1, 2, 10, None]), 11, "no label"),
        (
            pa.array([Decimal("0.00"), Decimal("1.00"), Decimal("2.00"), Decimal("10.00"), Decimal("0.50")]),
            11,
            "'0.50'",
        ),
    ],
)
def test_one_value_that_is_no_label_is_one_reject(tmp_path, labels, number, reason):
    classes, found, reasons = built(parquet(tmp_path / "t.parquet", labels), tmp_path / "out")
    assert classes == tuple(map(str, range(number))) and found == [0, 1, 2, 10, None]
    assert len(reasons) == 1 and reason in reasons[0] and reasons[0].startswith("column 'label': ")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (pa.array([[0, 1], [1], [2, 3]]), "one value, not list: a sample belongs to one class"),
        (pa.array([{"a": 1}, {"a": 2}]), "one value, not dict"),
        (pa.array([None, None], pa.int64()), "no label in column 'label': no label"),
        (pa.array([-1, -1]), "no label is the number of a class"),
        (pa.array(["0", "1", "cat"]), "labels are numbers and names"),
    ],
)
def test_a_column_without_labels_is_refused(tmp_path, labels, reason):
    with pytest.raises(DataError, match=reason):
        built(parquet(tmp_path / "t.parquet", labels), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_among_labels_are_rejects(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "label": label} for label in ("cat", ["cat", "dog"], "dog")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TableSource([tmp_path / "t.jsonl"], Columns("image", label="label"))
    assert (source.classes, [r.label for r in source]) == (("cat", "dog"), [0, None, 1])


def test_names_of_hugging_face_are_used(tmp_path):
    path = parquet(tmp_path / "t.parquet", pa.array([2, 0, 2, -1, 3]), ["zebra", "ant", "yak"])
    classes, found, reasons = built(path, tmp_path / "out")
    assert (classes, found) == (("zebra", "ant", "yak"), [2, 0, 2, None, None]), "in their order, ant too"
    assert all("is not one of 3 classes" in reason for reason in reasons) and len(reasons) == 2


def test_names_of_digits_of_hugging_face_are_names(tmp_path):
    path = parquet(tmp_path / "t.parquet", pa.array([0, 1, 2]), ["2", "0", "1"])
    assert built(path, tmp_path / "out")[:2] == (("2", "0", "1"), [0, 1, 2])


def test_tables_that_name_their_classes_in_other_orders(tmp_path):
    parquet(tmp_path / "0.parquet", pa.array([0, 1]), ["cat", "dog"])
    parquet(tmp_path / "1.parquet", pa.array([0, 1]), ["eel", "cat"])
    source = TableSource([tmp_path], Columns("image", label="label"))
    assert (source.classes, [r.label for r in source]) == (("cat", "dog", "eel"), [0, 1, 2, 0])


def test_a_given_list_and_names_meet_by_name(tmp_path):
    path = parquet(tmp_path / "t.parquet", pa.array([0, 1, 2]), ["cat", "dog", "eel"])
    known = Known(("eel", "cat"), closed=True)
    assert built(path, tmp_path / "out", known) == (
        *(("eel", "cat"), [1, None, 0], ["column 'label': label 'dog' is not one of 2 classes"]),
    )


def test_rows_are_chosen_by_a_column(tmp_path):
    vendors = ["a", "b", "c", "a"]
    path = parquet(tmp_path / "t.parquet", pa.array(["ant", "bee", "cow", "dog"]), vendor=vendors)
    source = TableSource([path], Columns("image", label="label"), where='vendor in ("a", "b")')
    assert (source.total, source.left_out, source.classes) == (3, 1, ("ant", "bee", "dog")), (
        "classes of these rows alone"
    )
    assert [(r.key, r.label) for r in source] == [("000000000", 0), ("000000001", 1), ("000000003", 2)]
    assert source.describe()["where"] == 'vendor in ("a", "b")'
    plain = TableSource([path], Columns("image"), where='vendor == "c"')
    assert [r.key for r in plain] == ["000000002"] and plain.total == 1


def test_rows_that_cannot_be_compared_or_read_are_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text("image,score\na.png,0.9\na.png,bad\na.png,0.1\na.png\na.png,\n")
    source = TableSource([tmp_path / "t.csv"], Columns("image"), where="score > 0.5")
    assert (source.total, source.left_out) == (3, 2)
    result = build(source, tmp_path / "out", Options({}))
    assert (result.counts.samples, result.counts.inputs) == (1, 3)
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert reasons == ["--where: 'bad' is no number", "line 5 has 1 cells, the header 2"]


def test_mistakes_in_conditions(tmp_path):
    (tmp_path / "t.csv").write_text("image,score\na.png,0.9\n")
    with pytest.raises(ConfigError, match="has no column 'vendor'"):
        TableSource([tmp_path / "t.csv"], Columns("image"), where='vendor == "a"')
    with pytest.raises(ConfigError, match="--where score > 1 takes none of 1 rows"):
        TableSource([tmp_path / "t.csv"], Columns("image"), where="score > 1")


def test_another_condition_is_another_build(tmp_path):
    path = parquet(tmp_path / "t.parquet", pa.array([0, 1, 0, 1]), n=[1, 2, 3, 4])
    build(TableSource([path], Columns("image"), where="n < 3"), tmp_path / "out", Options({}))
    with pytest.raises(ConfigError, match=r"other settings.*where"):
        build(TableSource([path], Columns("image"), where="n < 4"), tmp_path / "out", Options({}))


def test_the_key_stays_in_the_metadata(tmp_path):
    path = parquet(tmp_path / "t.parquet", pa.array([0, 1]), person=["p0", "p1"])
    build(TableSource([path], Columns("image", key="person")), tmp_path / "out", Options({}))
    content = members(tmp_path / "out/train")
    assert [json.loads(content[f"{i:09d}.json"])["person"] for i in range(2)] == ["p0", "p1"]
