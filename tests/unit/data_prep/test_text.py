"""Texts beside images, as others wrote them: their encodings, marks and numbers, from folders, tars and tables."""

import json

import pytest

from data_prep.build import build
from data_prep.describe import sheet
from data_prep.index import index
from data_prep.options import Options
from data_prep.prepare import prepare
from data_prep.record import Inline, Record
from data_prep.sources.folder import FolderSource
from data_prep.sources.tars import TarsSource
from data_prep.text import decoded, encoding_of, json_table, strict_json
from data_prep.tokenizer import train_tokenizer
from tests.unit.data_prep.samples import ListSource, inline, members, png, write_tar
from tests.unit.data_prep.test_build import lines

TEXT = "caf\u00e9 \U0001f408\u2028\x85 \u202b\u05e9"
GOOD = {e: TEXT.encode(e) for e in ("utf-8", "utf-8-sig", "utf-16", "utf-32")}
GOOD["utf-16, the other way"] = b"\xfe\xff" + TEXT.encode("utf-16-be")
BAD = {"latin-1": "caf\u00e9 au lait".encode("latin-1"), "cut utf-16": TEXT.encode("utf-16")[:-1], "half": b"caf\xc3"}


def strictly(text):
    """JSON by its own grammar, which knows no NaN."""

    def fail(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=fail)


@pytest.mark.parametrize("name", GOOD)
def test_texts_that_say_what_they_are(name):
    assert decoded(GOOD[name]) == TEXT
    assert json_table(json.dumps({"a": TEXT}, ensure_ascii=False).encode(encoding_of(GOOD[name]))) == ({"a": TEXT}, "")


@pytest.mark.parametrize("name", BAD)
def test_texts_in_another_encoding_are_refused(name):
    with pytest.raises(ValueError, match=r"not UTF-.*convert it"):
        decoded(BAD[name])
    assert "metadata is not JSON: not UTF-" in json_table(b'{"a": "' + BAD["latin-1"] + b'"}')[1]


@pytest.mark.parametrize("source", ["folder", "tars"])
def test_captions_and_metadata_are_whole_or_rejected(tmp_path, source):
    content = {}
    texts = {**GOOD, **BAD}
    for i, data in enumerate(texts.values()):
        content |= {f"{i}.png": png(i), f"{i}.txt": data, f"j{i}.png": png(50 + i)}
        words = data if i >= len(GOOD) else json.dumps({"w": TEXT}, ensure_ascii=False).encode(encoding_of(data))
        content[f"j{i}.json"] = b'{"w": "' + words + b'"}' if i >= len(GOOD) else words
    (tmp_path / "in").mkdir()
    if source == "tars":
        write_tar(tmp_path / "in/x.tar", content)
    for name, data in content.items() if source == "folder" else ():
        (tmp_path / "in" / name).write_bytes(data)
    made = FolderSource(tmp_path / "in") if source == "folder" else TarsSource([tmp_path / "in"])
    built = build(made, tmp_path / "out", Options({}))
    found = members(tmp_path / "out/train")
    assert [v.decode() for k, v in found.items() if k.endswith("txt")] == [TEXT] * len(GOOD)
    assert [strictly(v) for k, v in found.items() if k.endswith("json")] == [{"w": TEXT}] * len(GOOD)
    assert built.counts.rejects == 2 * len(BAD)
    reasons = [line["reason"] for line in lines(tmp_path / "out/rejects.jsonl")]
    assert sum(r.startswith(".txt is not UTF-") for r in reasons) == len(BAD)


def test_metadata_is_json_that_every_reader_takes():
    odd = b'{"a": NaN, "b": [1e400, {"c": -Infinity}], "d": 0.5, "e": 123456789012345678901234567890}'
    table, _ = json_table(odd)
    member = dict(prepare(Record("k", "k", Inline(png()), metadata=table), Options({})).members)["json"]
    assert strictly(member) == {"a": None, "b": [None, {"c": None}], "d": 0.5, "e": 123456789012345678901234567890}
    assert strictly(strict_json({float("nan"): float("inf")})) == {"nan": None}
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert (
        prepare(Record("k", "k", Inline(png()), metadata={"a": deep}), Options({})) == "metadata is nested too deeply"
    )


def test_labels_with_a_byte_order_mark_are_labels(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"\xef\xbb\xbf1\r\n", "b.png": png(1), "b.cls": b"0"})
    assert index(str(tmp_path)).statistics["labels"] == {"0": 1, "1": 1}
    source = TarsSource([tmp_path / "x.tar"])
    assert source.classes == ("0", "1") and [record.label for record in source] == [1, 0]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x1c", "\x0b", "\u2029"])
def test_names_of_inputs_that_split_lines_elsewhere(tmp_path, odd):
    """A line of rejects.jsonl is one for the next part too, and for all after it."""
    for part in range(3):
        folder = tmp_path / f"in{part}"
        folder.mkdir()
        for i in range(2):
            (folder / f"{part}-{i}.png").write_bytes(png(10 * part + i))
        (folder / f"{part} My photo{odd}2019.png").write_bytes(b"no image")
        build(FolderSource(folder), tmp_path / "out", Options({}), append=part > 0)
    text = (tmp_path / "out/rejects.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line)["source"] for line in text.split("\n")[:-1]]
    assert found == [f"{part} My photo{odd}2019.png" for part in range(3)]


def test_tokenizers_are_trained_from_what_the_stream_reads(tmp_path):
    """Texts in other encodings are no samples of it; a byte-order mark is no letter."""
    files = []
    for more in ({}, {"x.txt": b"\xe9" * 200, "y.txt": b"\xef\xbb\xbf" + b"hello " * 50}):
        folder = tmp_path / str(len(files))
        folder.mkdir()
        write_tar(folder / "a.tar", {"a.txt": b"hello " * 50, **(more or {"y.txt": b"hello " * 50})})
        index(str(folder))
        train_tokenizer(str(folder), 300)
        files.append((folder / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_a_long_caption_is_shown_by_its_beginning(tmp_path):
    """In time that does not grow with it: the picture fits words by measuring them."""
    caption = "word " * 200_000
    build(ListSource(inline(1, caption=caption)), tmp_path, Options({}))
    measured = []

    class Font:
        def getlength(self, text):
            measured.append(len(text))
            return 6.0 * len(text)

    from data_prep import describe

    assert describe._fitting(caption, Font()).endswith("...") and max(measured) <= 140 and len(measured) < 200
    _, page = sheet(str(tmp_path / "train"), 1)
    assert len(page) < 40_000 and "(1,000,000 characters)" in page
