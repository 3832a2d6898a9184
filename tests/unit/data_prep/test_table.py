"""Tables of every kind give the same samples."""

import base64
import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.fetch import Remote
from data_prep.options import Options
from data_prep.sources.table import Columns, TableSource
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import members, png, stock_reader
from tests.unit.data_prep.test_build import lines

N = 6
COLUMNS = Columns("file", ("text", "alt"), "kind")
CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "images").mkdir()
    made = []
    for i in range(N):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
        text = f'caption, "quoted" \n {i} \u00e4'
        made.append({"file": f"images/{i}.png", "text": text, "alt": f"alt {i}", "kind": CLASSES[i % 3], "n": i})
    return made


def write(path, rows):
    kind = path.suffixes[0]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as f:
        if kind == ".jsonl":
            f.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(f, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def check(out):
    content = members(out)
    for i in range(N):
        key = f"{i:09d}"
        assert content[f"{key}.png"] == png(i)
        assert content[f"{key}.txt"].decode() == f'caption, "quoted" \n {i} \u00e4'
        assert content[f"{key}.alt.txt"].decode() == f"alt {i}"
        assert content[f"{key}.cls"] == str(i % 3).encode()
        assert int(json.loads(content[f"{key}.json"])["n"]) == i
    assert len(content) == 5 * N


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
def test_every_kind(tmp_path, rows, name):
    write(tmp_path / name, rows)
    built = build(TableSource([tmp_path / name], COLUMNS), tmp_path / "out", Options({}))
    check(tmp_path / "out/train")
    manifest = built.manifests["train"]
    assert manifest.classes == CLASSES
    assert list(manifest.fields) == ["image", "label", "caption", "metadata", "alt.txt"]
    assert len(stock_reader(tmp_path / "out/train")) == N


@pytest.mark.parametrize("shape", ["bytes", "hugging face", "base64"])
def test_images_as_bytes(tmp_path, rows, shape):
    for i, row in enumerate(rows):
        row["file"] = {
            "bytes": png(i),
            "hugging face": {"bytes": png(i), "path": f"{i}.jpg"},
            "base64": "base64:" + base64.b64encode(png(i)).decode(),
        }[shape]
    name = "t.jsonl" if shape == "base64" else "t.parquet"
    write(tmp_path / name, rows)
    build(TableSource([tmp_path / name], COLUMNS), tmp_path / "out", Options({}))
    check(tmp_path / "out/train")


def test_a_folder_of_tables_and_several_captions(tmp_path, rows):
    for row in rows:
        row["text"] = [row["text"], "second", "third"]
    write(tmp_path / "a.jsonl", rows[:4])
    write(tmp_path / "b.jsonl", rows[4:])
    source = TableSource([tmp_path], Columns("file", ("text",)))
    built = build(source, tmp_path / "out", Options({}))
    assert built.counts.samples == N
    content = members(tmp_path / "out/train")
    assert (content["000000005.1.txt"], content["000000005.2.txt"]) == (b"second", b"third")


def test_a_folder_of_compressed_tables(tmp_path, rows):
    write(tmp_path / "t.csv.gz", rows)
    assert len(list(TableSource([tmp_path], COLUMNS))) == N
    whole = (tmp_path / "t.csv.gz").read_bytes()
    for broken in (whole[:-20], whole[:-8] + bytes(8)):
        (tmp_path / "t.csv.gz").write_bytes(broken)
        with pytest.raises(DataError, match="no whole gzip file"):
            list(TableSource([tmp_path], COLUMNS))


def test_a_column_may_decide_the_split(tmp_path, rows):
    for i, row in enumerate(rows):
        row["person"] = f"p{i % 2}"
    write(tmp_path / "t.jsonl", rows)
    source = TableSource([tmp_path / "t.jsonl"], Columns("file", key="person"))
    assert [r.identity for r in source] == ["p0", "p1"] * 3
    assert [r.metadata["person"] for r in source] == ["p0", "p1"] * 3, "it is kept"
    assert [r.identity for r in TableSource([tmp_path / "t.jsonl"], Columns("file"))] == [r["file"] for r in rows]


def test_expected_hashes_go_with_their_addresses(tmp_path):
    stamps = set()
    for expected in ("ab" * 16, "cd" * 16):
        write(tmp_path / "t.csv", [{"url": "http://x/y.png", "md5": expected}])
        (record,) = TableSource([tmp_path / "t.csv"], Columns("url", expected="md5"))
        assert (record.image, record.metadata) == (Remote("http://x/y.png", expected), None)
        stamps.add(record.stamp)
    assert len(stamps) == 2, "another one is another input"


def test_whatever_is_written_beside_an_image_is_part_of_the_input(tmp_path, rows):
    row, stamps = rows[0], set()
    for change in ({}, {"kind": "emu"}, {"text": "t"}, {"alt": "a"}, {"n": 9}):
        write(tmp_path / "t.jsonl", [{**row, **change}, row, {**row, "kind": "emu"}])
        stamps.add(next(iter(TableSource([tmp_path / "t.jsonl"], COLUMNS))).stamp)
    assert len(stamps) == 5


def test_bytes_that_change_under_their_name_are_another_input(tmp_path):
    stamps = set()
    for i in range(2):
        write(tmp_path / "t.parquet", [{"image": {"bytes": png(i), "path": "a.png"}}])
        stamps.add(next(iter(TableSource([tmp_path / "t.parquet"], Columns("image")))).stamp)
    assert len(stamps) == 2


def test_cells_hold_long_texts_and_ends_of_lines(tmp_path):
    data = png(1, (480, 480))
    assert len(base64.b64encode(data)) > 131_072, "what Python's csv takes unless it is told otherwise"
    text = "one\r\ntwo\nthree"
    write(tmp_path / "t.csv", [{"image": "base64:" + base64.b64encode(data).decode(), "text": text}])
    (record,) = TableSource([tmp_path / "t.csv"], Columns("image", ("text",)))
    assert (record.image.read(), record.caption) == (data, text)


def test_the_first_caption_that_is_not_empty(tmp_path, rows):
    (row,) = rows[:1]
    write(tmp_path / "t.jsonl", [{**row, "text": ["", None, "a", "", "b"]}])
    (record,) = TableSource([tmp_path / "t.jsonl"], Columns("file", ("text",)))
    assert (record.caption, record.more) == ("a", {"1.txt": b"b"})


def test_long_names_of_captions_fit_a_header(tmp_path, rows):
    name = "Caption_" * 30
    write(tmp_path / "t.jsonl", [{**row, name: "x"} for row in rows])
    build(TableSource([tmp_path / "t.jsonl"], Columns("file", ("text", name))), tmp_path / "out", Options({}))
    assert f"000000000.{name.lower()[:40]}.txt" in members(tmp_path / "out/train")


def test_the_root_may_be_a_link_and_elsewhere(tmp_path, rows):
    (tmp_path / "tables").mkdir()
    write(tmp_path / "tables/t.csv", rows)
    (tmp_path / "link").symlink_to(tmp_path)
    build(TableSource([tmp_path / "tables/t.csv"], COLUMNS, root=str(tmp_path / "link")), tmp_path / "out", Options({}))
    check(tmp_path / "out/train")


def test_numbers_as_labels(tmp_path, rows):
    for i, row in enumerate(rows):
        row["kind"] = i % 2 * 3
    write(tmp_path / "t.csv", rows)
    source = TableSource([tmp_path / "t.csv"], COLUMNS)
    assert source.classes == ("0", "1", "2", "3")
    assert [r.label for r in source] == [0, 3] * 3


def test_every_bad_row_is_rejected_with_its_reason(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "root" / "ok.png").write_bytes(png(2))
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    bad = {
        "../secret.png": "outside of",
        str(tmp_path / "secret.png"): "outside of",
        "link.png": "outside of",
        "/etc/passwd": "outside of",
        "missing.png": "no such file",
        "ok.png/more": "no such file",
        "": "nothing in column",
        "x\0y": "not a path",
        "http://127.0.0.1/x.png": "a URL",
        "base64:!!": "not base64",
    }
    text = [json.dumps({"file": name}) for name in ("ok.png", *bad)] + ["{", "[1]", "", json.dumps({"other": 1})]
    (tmp_path / "root" / "t.jsonl").write_text("\n".join(text))
    built = build(TableSource([tmp_path / "root/t.jsonl"], Columns("file")), tmp_path / "out", Options({}))
    assert (built.counts.samples, built.counts.inputs) == (1, len(bad) + 4)
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    for reason, expected in zip(
        reasons, [*bad.values(), "is not JSON", "is no table", "nothing in column"], strict=True
    ):
        assert expected in reason


def test_ragged_csv_and_missing_labels(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_text("file,kind\na.png,x\na.png\na.png,x,y\n\na.png,\n")
    build(TableSource([tmp_path / "t.csv"], Columns("file", label="kind")), tmp_path / "out", Options({}))
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert reasons == [
        "line 3 has 1 cells, the header 2",
        "line 4 has 3 cells, the header 2",
        "column 'kind': no label",
    ]


def test_whole_numbers_with_gaps(tmp_path, rows):
    """A table with gaps in a column of integers holds floats and NaN."""
    kinds, numbers = [0.0, 10.0, float("nan"), 2.0], [1.5, float("inf"), 2, 3]
    masks = [{"bytes": b"x", "path": "m"}] * 4
    table = {"file": [r["file"] for r in rows[:4]], "kind": kinds, "n": numbers, "mask": masks}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    source = TableSource([tmp_path / "t.parquet"], Columns("file", label="kind"))
    assert source.classes == tuple(str(i) for i in range(11))
    records = list(source)
    assert [r.label for r in records] == [0, 10, None, 2]
    assert [r.metadata for r in records] == [{"n": n, "mask": {"path": "m"}} for n in (1.5, None, 2.0, 3.0)]


def test_json_lines_may_lack_what_others_have(tmp_path, rows):
    first, second = rows[0] | {"text": None}, rows[1]
    del first["text"]
    (tmp_path / "t.jsonl").write_text("{broken\n" + json.dumps(first) + "\n" + json.dumps(second) + "\n" + "[" * 99999)
    source = TableSource([tmp_path / "t.jsonl"], Columns("file", ("text",)))
    build(source, tmp_path / "out", Options({}))
    assert {k for k in members(tmp_path / "out/train") if k.endswith("txt")} == {"000000002.txt"}
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert [r.split(":")[0] for r in reasons] == ["line 1 is not JSON", "line 4 is not JSON"]


def test_halves_of_characters(tmp_path):
    """JSON can hold a half of a pair of UTF-16 that no file can."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"file": "a.png", "text": "x\ud800y", "kind": "\ud800", "n": "\udc00"}, {"file": "\ud800.png", "kind": "k"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TableSource([tmp_path / "t.jsonl"], Columns("file", ("text",), "kind"))
    built = build(source, tmp_path / "out", Options({}))
    assert (built.counts.samples, built.manifests["train"].classes) == (1, ("\\ud800", "k"))
    assert members(tmp_path / "out/train")["000000000.txt"] == b"x?y"
    assert lines(tmp_path / "out/rejects.jsonl")[0]["source"] == "\\ud800.png"


def test_a_vanished_root_stops_the_build(tmp_path, rows):
    write(tmp_path / "t.csv", rows)
    source = TableSource([tmp_path / "t.csv"], COLUMNS, root=str(tmp_path / "mount"))
    with pytest.raises(DataError, match=r"mount.*same command"):
        build(source, tmp_path / "out", Options({}))


def test_mistakes(tmp_path, rows):
    write(tmp_path / "t.csv", rows)
    with pytest.raises(ConfigError, match="has no column 'flie', only 'file', 'text'"):
        TableSource([tmp_path / "t.csv"], Columns("flie"))
    with pytest.raises(ConfigError, match="has no column 'sha'"):
        TableSource([tmp_path / "t.csv"], Columns("file", expected="sha"))
    (tmp_path / "twice.csv").write_text("file,x,x\n")
    with pytest.raises(ConfigError, match="several columns 'x'"):
        TableSource([tmp_path / "twice.csv"], Columns("file"))
    (tmp_path / "stems.csv").write_text("file,text,Alt text,alt-text\n")
    with pytest.raises(ConfigError, match=r"'Alt text', 'alt-text' would all be \.alt_text\.txt"):
        TableSource([tmp_path / "stems.csv"], Columns("file", ("text", "Alt text", "alt-text")))
    for no_class in ("12345678901", "9" * 5000, "0" * 30 + "7"):
        (tmp_path / "ids.csv").write_text(f"file,id\na,{no_class}\n")
        with pytest.raises(DataError, match="no class numbers"):
            TableSource([tmp_path / "ids.csv"], Columns("file", label="id"))
    with pytest.raises(ConfigError, match="not a table"):
        (tmp_path / "t.xlsx").touch()
        TableSource([tmp_path / "t.xlsx"], COLUMNS)
    with pytest.raises(DataError, match="no table at"):
        TableSource([tmp_path / "no.csv"], COLUMNS)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        TableSource([tmp_path / "bad.parquet"], COLUMNS)


def test_rows_are_streamed(tmp_path):
    with open(tmp_path / "t.csv", "w") as f:
        f.write("file,text\n")
        f.writelines(f"images/{i}.png,{'x' * 200}\n" for i in range(1000))
    tracemalloc.start()
    count = sum(1 for _ in TableSource([tmp_path / "t.csv"], Columns("file", ("text",))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 1000 and peak < 100_000, "the file has 220 kB"


CELL = st.text(max_size=30) | st.sampled_from(["../x.png", "/x.png", "a.png", "a\nb", '"', "\x00"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6), st.sampled_from(["csv", "tsv", "jsonl"]))
def test_random_tables(tmp_path_factory, cells, kind):
    root = tmp_path_factory.mktemp("random")
    (root / "a.png").write_bytes(png())
    cells = [("a.png", "", ""), *cells]
    rows = [
        {"file": a.replace("\0", ""), "text": b.replace("\0", ""), "odd.name": c.replace("\0", "")} for a, b, c in cells
    ]
    write(root / f"t.{kind}", rows) if not any(
        "\ud800" <= ch <= "\udfff" for r in rows for v in r.values() for ch in v
    ) else None
    if not (root / f"t.{kind}").exists():
        return
    source = TableSource([root / f"t.{kind}"], Columns("file", ("text", "odd.name")))
    built = build(source, root / "out", Options({}, shard_samples=2))
    assert built.counts.inputs == built.counts.samples + built.counts.rejects == len(rows)
    samples = stock_reader(root / "out/train")
    assert len({s["__key__"] for s in samples}) == built.counts.samples
    for sample in samples:
        row = rows[int(sample["__key__"])]
        assert sample.get("txt", b"").decode() == row["text"]
        assert sample.get("odd_name.txt", b"").decode() == row["odd.name"]
    assert {p.name for p in root.iterdir()} == {"a.png", "out", f"t.{kind}"}
