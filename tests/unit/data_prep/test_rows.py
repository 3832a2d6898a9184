"""Rows of tables as people write them: quotes that nothing closes, other encodings, cells that no path can be."""

import base64
import csv
import datetime
import gzip
import io
import json

import pytest

from data_prep import rows as reading
from data_prep.build import build
from data_prep.options import Options
from data_prep.rows import BROKEN, rows
from data_prep.sources.table import Columns, TableSource
from pipeline.core.errors import DataError
from tests.unit.data_prep.samples import encoded, members, picture, png
from tests.unit.data_prep.test_build import lines


def read(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return list(rows(str(path)))


def captions(path, text):
    return [row.get("caption", row.get(BROKEN)) for row in read(path, text)]


@pytest.mark.parametrize(("kind", "sign"), [("tsv", "\t"), ("csv", ",")])
@pytest.mark.parametrize(
    "caption",
    [
        '"An unfinished quotation',
        '"the best day" he said',
        'said "hello"',
        'ends here" and more',
        '"',
        '""',
        '"a""',
        '"one" and "two"',
        'plain "',
    ],
)
def test_a_quote_that_nothing_closes_loses_no_row(tmp_path, kind, sign, caption):
    """Wherever it stands, all other rows are as they are, and the one itself keeps its letters."""
    for place in (0, 400, 999):
        texts = [f"caption number {i}" for i in range(1000)]
        texts[place] = caption
        text = f"image{sign}caption\n" + "".join(f"{i}.png{sign}{c}\n" for i, c in enumerate(texts))
        found = read(tmp_path / f"t.{kind}", text)
        assert [row["image"] for row in found] == [f"{i}.png" for i in range(1000)]
        texts[place] = {'""': ""}.get(caption, caption)
        assert [row["caption"] for row in found] == texts


def test_quotes_closed_by_those_of_another_row(tmp_path):
    """As the first two rows are, by the second one's last letter; in a table of tabs, or over several rows."""
    head, text = "image\tcaption\n", '1.png\t"begins\n2.png\tand ends"\n3.png\tc\n'
    assert captions(tmp_path / "t.tsv", head + text) == ['"begins', 'and ends"', "c"]
    text = 'image,caption\n1.png,"begins\n2.png,b\n3.png,and ends"\n4.png,c\n'
    assert captions(tmp_path / "t.csv", text) == ['"begins', "b", 'and ends"', "c"]


def test_cells_that_are_quoted_as_they_should_be(tmp_path):
    """As Python's own writer writes and reads them."""
    cells = ["plain", "a,b\tc", 'say "x"', '"', '""', "two\nlines", "one\r\ntwo, three\n\nfour"]
    cells += ["", " ", "\u2028\x85", '"\n"']
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        target = io.StringIO()
        writer = csv.writer(target, delimiter=delimiter)
        writer.writerow(["n", "caption", 'odd "name"'])
        writer.writerows([str(i), cell, cells[-i]] for i, cell in enumerate(cells))
        found = read(tmp_path / f"t.{kind}", target.getvalue())
        assert [list(row.values()) for row in found] == [[str(i), c, cells[-i]] for i, c in enumerate(cells)]
        assert list(found[0]) == ["n", "caption", 'odd "name"']


def test_a_cell_of_more_lines_than_any_has_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LINES", 5)
    inside = "\n".join("abcdef")
    assert captions(tmp_path / "t.csv", f'image,caption\n1,"{inside}"\n') == [inside]
    assert len(captions(tmp_path / "t.csv", f'image,caption\n1,"{inside}\n7"\n')) == 7


def test_lines_without_end_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LINE", 40)
    long = "x" * 200
    found = captions(tmp_path / "t.csv", f"image,caption\na,b\nc,{long}\nd,e\n")
    assert found == ["b", "line 3 is longer than 40 characters", "e"]
    found = read(tmp_path / "t.jsonl", json.dumps({"a": long}) + '\n{"a": 1}\n')
    assert found == [{BROKEN: "line 1 is longer than 40 characters"}, {"a": 1}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "csv.gz"])
def test_byte_order_marks_say_the_encoding(tmp_path, kind, encoding):
    sign = "\t" if kind == "tsv" else ","
    text = f"image{sign}caption\na.png{sign}caf\u00e9 \U0001f408\n"
    text = json.dumps({"image": "a.png", "caption": "caf\u00e9 \U0001f408"}) + "\n" if kind == "jsonl" else text
    data = text.encode(encoding)
    assert read(tmp_path / f"t.{kind}", gzip.compress(data) if kind.endswith("gz") else data) == [
        {"image": "a.png", "caption": "caf\u00e9 \U0001f408"}
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_in_another_encoding_are_rejected(tmp_path, kind):
    """The others are taken: nothing is replaced in silence."""
    texts = ["plain", "un caf\u00e9", "plain too"]
    if kind == "csv":
        text = "image,caption\n" + "".join(f"{i}.png,{t}\n" for i, t in enumerate(texts))
    else:
        objects = [{"image": f"{i}.png", "caption": t} for i, t in enumerate(texts)]
        text = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)
    found = read(tmp_path / f"t.{kind}", text, "latin-1")
    assert [row.get("caption") for row in found] == ["plain", None, "plain too"]
    number = 3 if kind == "csv" else 2
    assert found[1][BROKEN] == f"line {number} is not UTF-8 (byte 0xe9); convert it: iconv -f latin1 -t utf-8"
    quoted = 'image,caption\n1,"two\nlines caf\u00e9"\n2,b\n'
    assert [BROKEN in row for row in read(tmp_path / "q.csv", quoted, "latin-1")] == [True, False]


def test_files_that_are_not_what_they_say_they_are(tmp_path):
    with pytest.raises(DataError, match=r"t\.csv: line 1 is not UTF-8"):
        read(tmp_path / "t.csv", "im\u00e4ge,caption\n", "latin-1")
    with pytest.raises(DataError, match="is not UTF-16"):
        read(tmp_path / "t.csv", b"\xff\xfe" + "a,b\n1,2\n".encode("utf-16-le")[:-1])


def test_unusual_ends_of_lines(tmp_path):
    text = "image,caption\ra.png,one\u2028two\rb.png,next\x85line\x0b\x0c\x1c\r"
    assert captions(tmp_path / "t.csv", text) == ["one\u2028two", "next\x85line\x0b\x0c\x1c"]
    text = "".join(json.dumps({"caption": c}, ensure_ascii=False) + "\n" for c in ("a\u2028b", "c\x85d"))
    assert captions(tmp_path / "t.jsonl", text) == ["a\u2028b", "c\x85d"]


# -- Parquet


@pytest.fixture
def parquet(tmp_path):
    pyarrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table

    def table(columns, **options):
        write(pyarrow.table(columns), tmp_path / "t.parquet", **options)
        return tmp_path / "t.parquet"

    return pyarrow, table


def test_one_cell_that_python_cannot_hold_is_one_row(parquet):
    pyarrow, table = parquet
    letters = pyarrow.array([b"a", b"caf\xe9", b"c"]).cast(pyarrow.binary()).view(pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(3, letters.buffers()[1], letters.buffers()[2])
    times = pyarrow.array([1, 2, 3], pyarrow.timestamp("ns"))
    years = pyarrow.array([0, 10**15, 0], pyarrow.timestamp("s"))
    found = list(rows(str(table({"n": [1, 2, 3], "text": broken, "time": times, "year": years}))))
    assert [row.get("text") for row in found] == ["a", None, "c"]
    assert found[1][BROKEN].startswith("row 2, column 'text': ")
    assert [row.get("year") for row in found][::2] == [datetime.datetime(1970, 1, 1)] * 2


def test_where_a_parquet_file_is_damaged_the_rest_is_one_rejected_row(parquet):
    _, table = parquet
    path = table({"n": list(range(200_000))}, row_group_size=50_000, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = data.find((120_000).to_bytes(8, "little"))
    assert at > 0
    begin = data.rfind((100_000).to_bytes(8, "little"), 0, at)
    data[begin - 60 : begin] = b"\xff" * 60
    path.write_bytes(data)
    found = list(rows(str(path)))
    assert [row.get("n") for row in found[:-1]] == list(range(len(found) - 1)) and 64_000 < len(found) <= 100_001
    assert found[-1][BROKEN].startswith(f"the rows from {len(found)} on are lost: ")


# -- images in cells


def make(tmp_path, cells, **columns):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": cell, **columns}) + "\n" for cell in cells))
    return build(TableSource([tmp_path / "t.jsonl"], Columns("image")), tmp_path / "out", Options({}))


@pytest.mark.parametrize("write", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("mark", ["", "base64:", "data:image/png;base64,", "data:;charset=x;base64,"])
def test_images_written_as_text(tmp_path, mark, write):
    files = [png(1), png(2, (90, 70)), encoded(picture(3), "JPEG"), encoded(picture(4), "WEBP", lossless=True)]
    built = make(tmp_path, [mark + write(data).decode().rstrip("=") for data in files])
    assert (built.counts.samples, built.counts.rejects) == (4, 0)
    assert [v for k, v in sorted(members(tmp_path / "out/train").items())] == files


def test_what_is_no_image_and_no_name_is_a_short_reject(tmp_path):
    """Whatever its length: text, broken base64, several images, tables."""
    data = base64.b64encode(png(0, (300, 300)) * 20).decode()
    cells = ["x" * 10**6, "/" * 10**6, "base64:" + "!" * 10**6, "data:image/png;base64,%%%"]
    cells += [[data, data], [[data]], {"a": data}]
    (tmp_path / "a.png").write_bytes(png())
    built = make(tmp_path, [*cells, ["a.png"], {"path": "a.png"}, []])
    assert (built.counts.samples, built.counts.rejects) == (2, 8)
    assert (tmp_path / "out/rejects.jsonl").stat().st_size < 8 * 600
    reasons = [line["reason"] for line in lines(tmp_path / "out/rejects.jsonl")]
    assert "neither a path nor an address nor base64, but 1,000,000 characters: 'xxx" in reasons[0]
    assert [r.split(" ")[0] for r in reasons] == ["neither", "neither", "not", "not", "2", "no", "nothing", "nothing"]


def test_a_path_that_begins_like_base64_is_a_path(tmp_path):
    (tmp_path / "iVBORw0KGgo").mkdir()
    name = "iVBORw0KGgo/" + "a" * 80 + ".png"
    (tmp_path / name).write_bytes(png())
    assert make(tmp_path, [name]).counts.samples == 1


def test_a_long_name_of_an_input_is_shortened_in_reports(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    make(tmp_path, ["a/" * 2000, "a.png"])
    (line,) = lines(tmp_path / "out/rejects.jsonl")
    assert line["source"] == "a/" * 500 + "... (4,000 characters)"
