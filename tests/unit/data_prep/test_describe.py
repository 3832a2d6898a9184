"""What is said about a data set: every number is right, and every picture in its place."""

import base64
import hashlib
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from data_prep.build import build
from data_prep.describe import LINE, MARGIN, TILE, renew_statistics, sheet, table
from data_prep.index import index
from data_prep.options import Options
from data_prep.record import Inline
from data_prep.statistics import Statistics
from data_prep.tokenizer import LEAST, train_tokenizer
from pipeline.core.errors import DataError
from tests.unit.data_prep.samples import ListSource, inline, png
from tests.unit.data_prep.test_scan import _tar
from tests.unit.data_prep.test_verbs import labelled


def test_statistics_made_anew_are_those_of_the_build(tmp_path):
    """Captions count in characters; samples may lack one."""
    captions = ["\u00e4\u00f6", None, "", "x" * 40]
    records = [replace(r, caption=c, image=Inline(png(9, (40, 9)))) for r, c in zip(inline(4), captions, strict=True)]
    built = build(ListSource(records), tmp_path, Options({})).manifests["train"]
    lengths = built.statistics["measures"]["caption_length"]
    assert (lengths["count"], lengths["sum"], lengths["min"], lengths["max"]) == (3, 42, 0, 40)
    seen = []
    assert renew_statistics(str(tmp_path / "train"), seen.append).statistics == built.statistics
    assert seen[-1] == 4


def test_deviations_of_very_many_pixels_alike_are_numbers():
    """A billion photographs: the sums need more than 64 bits, and rounding may leave less than nothing below a root."""
    statistics, n = Statistics(), 10**17
    statistics.pixels = n
    for value in range(1, 255):
        some = 10_000  # of the pixels are one brighter
        total, squares = n * value + some, (n - some) * value**2 + some * (value + 1) ** 2
        statistics.sums = [total] * 3 + [squares] * 3
        body = statistics.as_json()
        assert body["mean"] == [round(value / 255, 6)] * 3 and body["std"] == [0.0] * 3


def test_the_table_of_a_data_set(tmp_path):
    build(labelled(5), tmp_path, Options({}, shard_samples=2))
    manifest = train_tokenizer(str(tmp_path / "train"), 300)
    rows = dict(table(manifest))
    megabytes = sum(p.stat().st_size for p in (tmp_path / "train").glob("*.tar")) / 1e6
    sizes = [len(png(i)) for i in range(5)]
    assert rows["samples"] == "5" and rows["shards"] == f"3, {megabytes:.1f} MB"
    assert rows["width"] == "24 to 24, mean 24.0 of 5"
    assert rows["image bytes"] == f"{min(sizes):,} to {max(sizes):,}, mean {np.mean(sizes):,.1f} of 5"
    assert rows["fields"] == "image (png), label (cls), caption (txt)"
    assert (rows["classes"], rows["samples per class"], rows["tokenizer"]) == (
        "2 (x, y)",
        "2 to 3 in 2",
        "tokenizer.json",
    )
    some = [replace(r, caption="xx" if i else None) for i, r in enumerate(inline(3))]
    manifest = build(ListSource(some), tmp_path / "some", Options({})).manifests["train"]
    assert dict(table(manifest))["caption length"] == "2 to 2, mean 2.0 of 2"


def _pictures(page):
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_a_sheet_of_more_than_there_is_shows_each_once(tmp_path):
    build(labelled(3), tmp_path, Options({}, shard_samples=2))
    _, page = sheet(str(tmp_path / "train"), 48)
    assert re.findall('figure title="([^"]*)"', page) == ["0000", "0001", "0002"]


def test_tiles_keep_to_their_place(tmp_path):
    """Large pictures are made smaller in proportion, long texts are cut, and what is no picture is a red frame."""
    sizes = [(300, 60), (60, 300)]
    records = [replace(r, caption="W" * 90, image=Inline(png(i, sizes[i]))) for i, r in enumerate(inline(2))]
    build(ListSource(records), tmp_path, Options({}))
    picture, page = sheet(str(tmp_path / "train"), 1)
    pixels = np.asarray(picture)
    assert picture.size == (TILE + 2 * MARGIN, TILE + 2 * MARGIN + 2 * LINE)
    for outside in (pixels[:, :MARGIN], pixels[:, MARGIN + TILE :], pixels[:MARGIN], pixels[-LINE - MARGIN :]):
        assert (outside == 255).all()
    assert (pixels[MARGIN + TILE : -LINE - MARGIN] < 128).any(), "a line of text"
    assert [p.size for p in _pictures(sheet(str(tmp_path / "train"), 2)[1])] == [(128, 26), (26, 128)]
    _tar(tmp_path / "bad.tar", {"a.png": b"x", "a.txt": b"words"})
    index(str(tmp_path), pattern="bad.tar")
    picture, page = sheet(str(tmp_path), 1)
    assert "not an image in a known format<br>words" in page and _pictures(page) == []
    assert picture.getpixel((MARGIN, MARGIN)) == picture.getpixel((MARGIN + TILE - 1, MARGIN)) == (255, 0, 0)


def test_names_are_no_markup(tmp_path):
    folder = tmp_path / "<u>"
    folder.mkdir()
    _tar(folder / "x.tar", {'<i>".png': png()})
    index(str(folder))
    _, page = sheet(str(folder), 1)
    assert "<u>" not in page and "<i>" not in page
    assert 'title="&lt;i&gt;&quot;"' in page


def test_a_tokenizer_reads_the_fields_that_are_there(tmp_path):
    """The smallest holds the bytes alone; its hash is in the manifest."""
    build(labelled(5), tmp_path, Options({}, shard_samples=2))
    folder, seen = tmp_path / "train", []
    manifest = train_tokenizer(str(folder), LEAST, ("note.txt", "caption"), seen.append)
    data = (folder / "tokenizer.json").read_bytes()
    assert manifest.tokenizer == {"file": "tokenizer.json", "sha256": hashlib.sha256(data).hexdigest()}
    assert Tokenizer.from_str(data.decode()).get_vocab_size() == LEAST == 259 and seen == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"no field note\.txt or alt, only image, label, caption"):
        train_tokenizer(str(folder), 300, ("note.txt", "alt"))
