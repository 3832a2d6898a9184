"""Inputs that are rare one by one, and come by the thousand where there are a billion."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_prep.build import build
from data_prep.describe import renew_statistics, sheet
from data_prep.images import decode, store
from data_prep.index import index
from data_prep.merge import merge
from data_prep.options import Duplicates, ImageOptions, Options
from data_prep.record import Inline, LocalFile, Record, Rejected
from data_prep.sources.folder import FolderSource
from data_prep.sources.table import Columns, TableSource
from data_prep.sources.tars import TarsSource
from data_prep.statistics import Facts, Statistics
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import ShardIndex, index_bytes, load_index, save
from pipeline.core.manifest import load as load_manifest
from tests.unit.data_prep.samples import ListSource, encoded, inline, members, picture, png
from tests.unit.data_prep.test_build import _stop_after, lines
from tests.unit.data_prep.test_scan import _tar

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


# -- images


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_orientation_in_xmp(kind):
    stored = store(encoded(picture(size=(40, 20)), kind, xmp=XMP), ImageOptions())
    assert stored.pixels.size == (20, 40)


def test_orientation_of_formats_that_keep_it_elsewhere():
    image, exif, text = picture(size=(40, 20)), Image.Exif(), PngInfo()
    exif[0x0112] = 6
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    for data in (encoded(image, "TIFF", exif=exif), encoded(image, pnginfo=text)):
        turned = store(data, ImageOptions())
        np.testing.assert_array_equal(turned.pixels, image.transpose(Image.Transpose.ROTATE_270))
        assert store(data, ImageOptions("png", resize="short", size=10)).pixels.size == (10, 20)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    """Cameras append previews; a JPEG cut within its pixels holds no end after their beginning."""
    data = encoded(picture(), "JPEG")
    assert store(data + b"more", ImageOptions()).data == data + b"more"
    thumbnail = encoded(picture(1, (8, 8)), "JPEG")
    cut = data[:2] + b"\xff\xe5" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + data[2:-2]
    with pytest.raises(Rejected, match="has no end"):
        decode(cut)


def test_several_pictures_in_a_jpeg():
    data = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    stored = store(data, ImageOptions())
    assert (stored.extension, stored.data) == ("jpg", data), "decoders that know no MPO see the first"


@pytest.mark.parametrize("size", [(339, 330), (341, 330), (330, 341)])
def test_sides_do_not_depend_on_what_the_decoder_left_out(size):
    """A JPEG is decoded at a part of its size, rounded up: the longer side must come from the size in full."""
    stored = store(encoded(picture(size=size), "JPEG"), ImageOptions("jpg", resize="short", size=20))
    expected = [20, round(max(size) * 20 / min(size))]
    assert sorted(stored.pixels.size) == expected and (stored.pixels.size[0] > 20) == (size[0] > size[1])


@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_a_line_keeps_a_pixel(size):
    stored = store(encoded(picture(size=size)), ImageOptions("png", resize="long", size=30))
    assert stored.pixels.size == ((30, 1) if size[0] == 900 else (1, 30))


def test_transparent_grey_palettes():
    grey = Image.fromarray(np.array([[0, 90], [90, 200]], np.uint8))
    out = np.asarray(store(encoded(grey, transparency=90), ImageOptions()).pixels)
    assert out.tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [200] * 3]]


# -- duplicates


def test_equal_pixels_in_another_shape_are_another_image(tmp_path):
    shapes = [(6, 4), (4, 6), (2, 12)]
    contents = [encoded(Image.new("L", shape, 7)) for shape in shapes] + [encoded(Image.new("RGB", (2, 4), (7,) * 3))]
    records = [Record(str(i), str(i), Inline(data)) for i, data in enumerate(contents)]
    built = build(ListSource(records), tmp_path, Options({}, duplicates=Duplicates("drop")))
    assert built.counts.samples == 4


def test_duplicates_by_bytes_are_those_of_the_input(tmp_path):
    image = picture(1)
    contents = [encoded(image), encoded(image, compress_level=1), encoded(image)]
    records = [Record(str(i), str(i), Inline(data)) for i, data in enumerate(contents)]
    options = Options({}, duplicates=Duplicates("drop"), image=ImageOptions("webp"))
    build(ListSource(records), tmp_path, options)
    reasons = [r["reason"] for r in lines(tmp_path / "rejects.jsonl")]
    assert reasons == ["duplicate (pixels) of 0", "duplicate (bytes) of 0"]


# -- labels


def test_labels_that_are_no_numbers_are_reported(tmp_path):
    labels = [b"1\n", b"9" * 5000, "\u00b2".encode(), b"2", b"-1", b""]
    content = {}
    for i, label in enumerate(labels):
        content |= {f"{i}.png": png(i), f"{i}.cls": label}
    _tar(tmp_path / "x.tar", content)
    manifest = index(str(tmp_path), classes=("cat", "dog"))
    assert manifest.statistics["labels"] == {"1": 1, "2": 1}
    problems = verify(str(tmp_path), decode=1).problems["x.tar"]
    assert [p.split(".")[0] for p in problems] == ["1", "2", "3", "4", "5"]
    assert all("is not one of 2 classes" in p and len(p) < 100 for p in problems)
    assert renew_statistics(str(tmp_path)).statistics["labels"] == {"1": 1, "2": 1}
    _, page = sheet(str(tmp_path), 6)
    assert page.count("<figcaption>dog<") == 1 and "<figcaption>\u00b2<" in page


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_of_no_class_are_rejected(tmp_path, label):
    records = [replace(r, label=n) for r, n in zip(inline(3), (0, 1, label), strict=True)]
    build(ListSource(records, ("a", "b")), tmp_path, Options({}))
    assert [r["reason"] for r in lines(tmp_path / "rejects.jsonl")] == [f"label {label} is not one of 2 classes"]


# -- going on, and adding


def test_options_may_change_until_a_shard_is_finished(tmp_path):
    """And those of the second try are the ones that a third is compared with."""
    source, first, second = ListSource(inline(9)), Options({}, shard_samples=5), Options({}, shard_samples=4)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path, first, progress=_stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path, second, progress=_stop_after(7))
    built = build(source, tmp_path, second)
    assert [s.samples for s in built.manifests["train"].shards] == [4, 4, 1]
    assert built.manifests["train"].made["parts"][0]["options"]["shard_samples"] == 4


def test_a_duplicate_that_begins_a_shard_is_reported_once(tmp_path):
    """The note of the shard before it must not tell of it: it is looked at again when the build goes on."""
    records = inline(7)
    records[3] = replace(records[3], image=records[0].image)
    options = Options({}, shard_samples=3, duplicates=Duplicates("report"))
    with pytest.raises(KeyboardInterrupt):
        build(ListSource(records), tmp_path, options, progress=_stop_after(5))
    build(ListSource(records), tmp_path, options)
    assert [line["input"] for line in lines(tmp_path / "duplicates.jsonl")] == [3]


def test_other_names_for_the_classes_are_noticed(tmp_path):
    records = [replace(r, label=0) for r in inline(6)]
    with pytest.raises(KeyboardInterrupt):
        build(ListSource(records, ("a",)), tmp_path, Options({}, shard_samples=2), progress=_stop_after(5))
    with pytest.raises(ConfigError, match="classes: '1 names, sha256"):
        build(ListSource(records, ("b",)), tmp_path, Options({}, shard_samples=2))


def test_rejects_are_in_the_order_of_the_input_whatever_the_split(tmp_path):
    records = [replace(r, image=Inline(b"") if i % 2 else r.image) for i, r in enumerate(inline(40))]
    build(ListSource(records), tmp_path, Options({"val": 0.5}, shard_samples=3))
    rejects = lines(tmp_path / "rejects.jsonl")
    assert {r["split"] for r in rejects} == {"train", "val"}
    assert [r["input"] for r in rejects] == list(range(1, 40, 2))


def test_a_tokenizer_stays_when_data_is_added(tmp_path):
    from data_prep.tokenizer import train_tokenizer

    captioned = [replace(r, caption="a photo") for r in inline(6)]
    build(ListSource(captioned[:3]), tmp_path, Options({}))
    before = train_tokenizer(str(tmp_path / "train"), 300).tokenizer
    build(ListSource(captioned[3:], name="more"), tmp_path, Options({}), append=True)
    assert load_manifest(tmp_path / "train").tokenizer == before != {}


# -- sources


def test_a_changed_caption_is_a_changed_input(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    stamps = []
    for text in ("one", "two"):
        (tmp_path / "t.jsonl").write_text(json.dumps({"file": "a.png", "text": text}))
        (tmp_path / "a.txt").write_text(text)
        stamps.append([next(iter(TableSource([tmp_path / "t.jsonl"], Columns("file", ("text",))))).stamp])
        stamps[-1].append(next(iter(FolderSource(tmp_path))).stamp)
    assert stamps[0][0] != stamps[1][0] and stamps[0][1] != stamps[1][1]


def test_the_longest_keys_fit_a_header(tmp_path):
    for end, kind in (("jpeg", "JPEG"), ("png", "PNG"), ("json", "")):
        name = tmp_path / "in" / f"{'x' * 200}.{end}"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(encoded(picture(), kind) if kind else b"{}")
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    found = sorted(members(tmp_path / "out/train"))
    assert [name.partition("~")[2].partition("~")[2] for name in found] == [
        "jpeg.jpg",
        "jpeg.json",
        "png.json",
        "png.png",
    ]
    assert max(map(len, found)) <= 100


def test_a_folder_beside_the_root_is_outside(tmp_path):
    for name in ("root", "root2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
    (tmp_path / "root" / "t.csv").write_text("file\na.png\n../root2/a.png\n")
    build(TableSource([tmp_path / "root/t.csv"], Columns("file")), tmp_path / "out", Options({}))
    assert ["outside of" in r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")] == [True]
    from data_prep import places

    assert places.inside("../root2/a.png", "memory://store") is None
    assert places.inside("../store2/a.png", "memory://store") is None
    assert places.inside("b/../a.png", "memory://store") == "memory://store/a.png"


def test_an_image_in_a_table_keeps_its_split_when_it_is_encoded_anew(tmp_path):
    """Where the table names it, the name decides; not the bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}, {"bytes": None, "path": "c.png"}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    (tmp_path / "c.png").write_bytes(png(3))
    records = list(TableSource([tmp_path / "t.parquet"], Columns("image")))
    assert [r.identity for r in records][::2] == ["a.png", "c.png"]
    assert [r.image.read() for r in records] == [png(1), png(2), png(3)]


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbffile\na.png\n")
    assert len(list(TableSource([tmp_path / "t.csv"], Columns("file")))) == 1


def test_two_images_of_a_sample_in_a_tar(tmp_path):
    """The first is the image, the other comes along."""
    _tar(tmp_path / "x.tar", {"a.png": png(1), "a.jpg": encoded(picture(2), "JPEG"), "b.png": png(3)})
    first, second = TarsSource([tmp_path / "x.tar"])
    assert first.image.read() == png(1) and set(first.more) == {"jpg"}
    assert first.stamp != second.stamp
    _tar(tmp_path / "x.tar", {"a.png": png(1) + b"x" * 20_000, "b.png": png(3)})
    assert next(iter(TarsSource([tmp_path / "x.tar"]))).stamp != first.stamp


def test_devices_and_pipes_are_not_read():
    """A pipe would be waited for; this device at least answers."""
    with pytest.raises(Rejected, match="not a regular file"):
        LocalFile("/dev/null").read()


# -- what is said about data sets


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [0, 255, 256, 257], [8, 8, 7], [2**40 - 1, 2**40]])
def test_histograms_count_below_powers_of_two(values):
    one, many = Statistics(), Statistics()
    for value in values:
        one.add(Facts(None, None, value, None, None))
    many.measure("image_bytes", np.asarray(values))
    expected = {}
    for value in values:
        power = next(2**k for k in range(64) if value < 2**k)
        expected[str(power)] = expected.get(str(power), 0) + 1
    assert one.measures["image_bytes"]["below"] == many.measures["image_bytes"]["below"] == expected
    assert one.measures["image_bytes"] == many.measures["image_bytes"]


@pytest.mark.parametrize("kind", ["key", "offset", "size", "crc32"])
def test_every_column_of_an_index_is_compared(tmp_path, kind):
    build(ListSource(inline(3)), tmp_path, Options({}))
    manifest = load_manifest(tmp_path / "train")
    rows = load_index(manifest, manifest.shards[0])
    keys = ("0000", "000x", "0002") if kind == "key" else rows.keys
    arrays = {name: getattr(rows, name).copy() for name in ("offset", "size", "crc32")}
    if kind != "key":
        arrays[kind][1, 0] += -1 if kind == "size" else 1
    data = index_bytes(ShardIndex(keys, **arrays), manifest.shards[0], ("png",))
    (tmp_path / "train/train-000000.idx").write_bytes(data)
    assert "points elsewhere" in str(verify(str(tmp_path / "train")).problems)


def test_a_manifest_that_promises_other_numbers(tmp_path):
    build(ListSource(inline(3)), tmp_path, Options({}))
    manifest = load_manifest(tmp_path / "train")
    save(replace(manifest, shards=(replace(manifest.shards[0], samples=4, bytes=7),)), tmp_path / "train")
    problems = str(verify(str(tmp_path / "train")).problems["train-000000.tar"])
    assert f"has {manifest.shards[0].bytes} bytes, the manifest promises 7" in problems
    assert "has 3 samples, the manifest promises 4" in problems


def test_a_part_is_decoded_and_long_lists_are_cut(tmp_path):
    _tar(tmp_path / "x.tar", {f"{i}.png": b"no" for i in range(60)} | {"t.txt": b"\xff"})
    index(str(tmp_path))
    some, all_of_them = verify(str(tmp_path), decode=0.25), verify(str(tmp_path), decode=1)
    assert 4 < some.decoded < 30 and all_of_them.decoded == 61
    assert len(all_of_them.problems["x.tar"]) == 6 and all_of_them.problems["x.tar"][-1] == "and 56 more"


def test_what_cannot_be_merged(tmp_path):
    for name, n in (("a", 0), ("b", 3)):
        build(ListSource([replace(r, caption="x") for r in inline(6)[n : n + 3]]), tmp_path / name, Options({}))
    folders = [str(tmp_path / name / "train") for name in "ab"]
    first = load_manifest(folders[0])
    save(replace(first, tokenizer={"file": "t.json", "sha256": "0" * 64}), folders[0])
    with pytest.raises(DataError, match="another tokenizer"):
        merge(folders, str(tmp_path / "out"))
    save(first, folders[0])
    merged = merge(folders, str(tmp_path / "out"))
    assert [s.name for s in merged.shards] == ["000-train-000000.tar", "001-train-000000.tar"]
    assert len(members(tmp_path / "out")) == 12


def test_masks_beside_images_are_merged_as_what_they_are(tmp_path):
    """A "png" beside a "jpg" is a field of its own; where it is the image, the two are not the same thing."""
    for name in "ab":
        (tmp_path / name).mkdir()
        _tar(tmp_path / name / "x.tar", {f"{name}.jpg": encoded(picture(1), "JPEG"), f"{name}.png": png(2)})
    (tmp_path / "c").mkdir()
    _tar(tmp_path / "c/x.tar", {"c.png": png(3)})
    for name in "abc":
        index(str(tmp_path / name))
    merged = merge([str(tmp_path / name) for name in "ab"], str(tmp_path / "out"))
    assert merged.fields == {"image": ("jpg",), "png": ("png",)}
    assert (
        verify(str(tmp_path / "out"), decode=1).problems == {} and len(load_index(merged, merged.shards[1]).keys) == 1
    )
    for order in ("ac", "ca"):
        with pytest.raises(DataError, match=r"\.png is field '(image|png)' in .*, but '(png|image)'"):
            merge([str(tmp_path / name) for name in order], str(tmp_path / order))


def test_shards_of_sub_folders_are_merged_under_names_of_their_own(tmp_path):
    for name, key in (("one/a/0.tar", "a"), ("one/b/0.tar", "b"), ("two/0.tar", "c")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        _tar(tmp_path / name, {f"{key}.png": png(ord(key))})
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for folder in folders:
        index(folder)
    merged = merge(folders, str(tmp_path / "out"))
    assert sorted(members(tmp_path / "out")) == ["a.png", "b.png", "c.png"] and merged.samples == 3


def test_pixels_of_grey_images_count_in_every_channel(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    data = encoded(Image.fromarray(grey))
    assert Image.open(io.BytesIO(data)).mode == "L"
    statistics = (
        build(ListSource([Record("a", "a", Inline(data))]), tmp_path, Options({})).manifests["train"].statistics
    )
    np.testing.assert_allclose(statistics["mean"], [grey.mean() / 255] * 3, atol=1e-6)
    np.testing.assert_allclose(statistics["std"], [grey.std() / 255] * 3, atol=1e-6)
