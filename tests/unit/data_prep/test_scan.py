"""Damaged tars are found, every way of damage that the stock readers pass over in silence included."""

import io
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.dataset import items, read_manifest
from data_prep.index import fields_apart, index
from data_prep.options import Options
from data_prep.scan import scan
from data_prep.store import open_store
from data_prep.verify import verify
from data_prep.walk import group, walk
from pipeline.core.errors import DataError
from pipeline.core.manifest import load, load_index
from tests.unit.data_prep.samples import ListSource, encoded, inline, picture, png, stock_reader

SAMPLES = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set of two shards."""
    root = tmp_path_factory.mktemp("whole")
    build(ListSource([r for r in inline(2 * SAMPLES)]), root, Options({}, shard_samples=SAMPLES))
    return root / "train"


def _member(data: bytes, number: int) -> int:
    """Byte of a member's header."""
    return list(walk(data))[number].offset - 512


def _zeroed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(512) + data[at + 512 :]


DAMAGE = {
    "cut at a member boundary": (lambda d: d[: _member(d, 4)], "no end-of-archive blocks"),
    "cut inside a header": (lambda d: d[: _member(d, 4) + 100], "inside a header"),
    "header checksum wrong": (lambda d: d[: _member(d, 4)] + b"Z" + d[_member(d, 4) + 1 :], "wrong checksum"),
    "zeroed header": (lambda d: _zeroed(d, _member(d, 4)), "zeroed block"),
    "cut inside data": (lambda d: d[: _member(d, 4) + 700], "inside '0004.png'"),
    "cut inside the end": (lambda d: d[: _member(d, 7) + 512 * 2 + (_size(d, 7) // 512) * 512 + 512], "end-of-archive"),
    "bit rot in an image": (lambda d: d[: _member(d, 4) + 600] + b"~~~~" + d[_member(d, 4) + 604 :], "changed"),
    "empty": (lambda d: b"", "empty file"),
    "an HTML page": (lambda d: b"<html>" * 300, "not a tar"),
    "a short HTML page": (lambda d: b"<html>", "not a tar"),
    "garbage after the end": (lambda d: d + b"x" * 512, "more data follows"),
    "another shard's content": (None, "changed"),
}


def _size(data: bytes, number: int) -> int:
    return list(walk(data))[number].size


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds(whole, tmp_path, kind):
    shutil.copytree(whole, tmp_path / "x")
    assert verify(str(tmp_path / "x"), decode=1).problems == {}
    path = tmp_path / "x" / "train-000000.tar"
    change, message = DAMAGE[kind]
    path.write_bytes(change(path.read_bytes()) if change else (tmp_path / "x" / "train-000001.tar").read_bytes())
    problems = verify(str(tmp_path / "x")).problems
    assert next(iter(problems)) == "train-000000.tar"
    assert any(message in p for p in problems["train-000000.tar"]), problems
    if kind not in ("bit rot in an image", "another shard's content"):
        with pytest.raises(DataError, match=r"train-000000\.tar"):
            index(str(tmp_path / "x"))
        assert index(str(tmp_path / "x"), skip_damaged=True).samples == SAMPLES


def test_verify_finds_the_rest(whole, tmp_path):
    folder = tmp_path / "x"
    for kind, message in {
        "missing": "cannot be read",
        "index": "is damaged",
        "no index": "missing",
        "stranger": "not in the manifest",
        "sizes": "manifest says",
        "twice": "is in train-000000.tar too",
    }.items():
        shutil.copytree(whole, folder)
        if kind == "missing":
            (folder / "train-000000.tar").unlink()
        elif kind == "index":
            (folder / "train-000000.idx").write_bytes(b"x")
        elif kind == "no index":
            (folder / "train-000000.idx").unlink()
        elif kind == "stranger":
            (folder / "other.tar").write_bytes(b"")
        elif kind == "sizes":
            (folder / "sizes.json").write_text("{}")
        else:
            shutil.copy(folder / "train-000000.tar", folder / "train-000001.tar")
            index(str(folder))
        problems = verify(str(folder)).problems
        assert len(problems) == 1 and message in str(problems), (kind, problems)
        shutil.rmtree(folder)


def test_verify_notices_a_wrong_index(whole, tmp_path):
    from pipeline.core.manifest import ShardIndex, index_bytes

    shutil.copytree(whole, tmp_path / "x")
    manifest = load(tmp_path / "x")
    rows = load_index(manifest, manifest.shards[0])
    moved = ShardIndex(rows.keys, rows.offset + 512, rows.size)
    (tmp_path / "x" / "train-000000.idx").write_bytes(index_bytes(moved, manifest.shards[0], ("png",)))
    assert "points elsewhere" in str(verify(str(tmp_path / "x")).problems)


def test_decoding_finds_what_was_bad_from_the_start(tmp_path):
    content = {"a.png": png(), "b.png": png()[:-20], "c.png": png(), "c.cls": b"7", "d.png": png(), "d.json": b"{"}
    _tar(tmp_path / "x.tar", content)
    index(str(tmp_path), classes=("cat", "dog"))
    assert verify(str(tmp_path)).problems == {}
    report = verify(str(tmp_path), decode=1)
    assert report.decoded == 4
    assert [p.split(":")[0] for p in report.problems["x.tar"]] == ["b.png", "c.cls", "d.json"]


def _tar(path, content, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150).filter(
    lambda n: not n.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, st.binary(max_size=1200), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_walk_agrees_with_tarfile(content, format):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = target.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert [(e.name.rstrip("/"), e.offset, e.size) for e in walk(data)] == expected


def test_gnu_tar_with_folders_and_links(tmp_path):
    (tmp_path / "in" / ("long" * 30)).mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    (tmp_path / "in" / ("long" * 30) / ("name" * 20 + ".b.png")).write_bytes(png(2))
    (tmp_path / "in" / "link.png").symlink_to("a.png")
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    found = scan(tmp_path / "x.tar")
    assert found.problem == ""
    assert found.extensions == ["b.png", "png"]


def test_indexed_tars_are_what_webdataset_reads(tmp_path):
    for i in range(3):
        content = {}
        for j in range(4):
            content[f"class{j}/img.{i}{j}.dots/n.JPG" if j == 3 else f"{i}{j}.jpg"] = png(j)
            content[f"class{j}/img.{i}{j}.dots/n.txt" if j == 3 else f"{i}{j}.txt"] = b"x" * j
        _tar(tmp_path / f"{i}.tar", {"README": b"no key", "__meta.json__": b"{}", **content})
    manifest = index(str(tmp_path), pattern="{0..2}.tar")
    assert manifest.fields == {"image": ("jpg",), "caption": ("txt",)}
    keys = [k for s in manifest.shards for k in load_index(manifest, s).keys]
    assert keys == [s["__key__"] for s in stock_reader(tmp_path)]
    assert manifest.statistics["measures"]["caption_length"]["sum"] == 3 * 6
    assert (tmp_path / "sizes.json").exists()
    again = index(str(tmp_path))
    assert again.fingerprint == manifest.fingerprint


def test_processes_find_what_threads_find(tmp_path, monkeypatch):
    for i in range(5):
        _tar(tmp_path / f"{i}.tar", {f"{i}{j}.{e}": bytes([j]) * 5000 for j in range(4) for e in ("jpg", "txt", "cls")})
    threads = index(str(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for path in (*tmp_path.glob("*.idx"), *tmp_path.glob("*.json")):
        path.unlink()
    monkeypatch.setattr("data_prep.index.MUCH", 0)
    seen = []
    assert index(str(tmp_path), progress=lambda done, total: seen.append((done, total))) == threads
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert seen == [(i + 1, 5) for i in range(5)]
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:-11_000])
    with pytest.raises(DataError, match=r"damaged tars:\n  3\.tar: cut"):
        index(str(tmp_path))
    (tmp_path / "3.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*3\.tar"):
        index(str(tmp_path), pattern="{0..4}.tar")


def test_keys_in_pieces_are_damage(tmp_path):
    _tar(tmp_path / "x.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.txt": b"3"})
    with pytest.raises(DataError, match="'a' occurs in two places"):
        index(str(tmp_path))
    entries = list(walk((tmp_path / "x.tar").read_bytes()))
    assert len(list(group(iter(entries[:2])))) == 2


def test_labels_and_classes(tmp_path):
    _tar(tmp_path / "x.tar", {"a.jpg": png(), "a.cls": b"0", "b.jpg": png(), "b.cls": b"2"})
    assert index(str(tmp_path)).classes == ("0", "1", "2")
    assert index(str(tmp_path), classes=("x", "y", "z")).classes == ("x", "y", "z")
    assert index(str(tmp_path)).classes == ("x", "y", "z"), "kept when renewed"


def test_names_and_labels_that_make_no_sense(tmp_path):
    """They are told apart from data, not run into."""
    content = {"a.jpg": b"1", "a.": b"2", "b.": b"3", "a.cls": b"9" * 5000, "c.jpg": b"4", "c.cls": b"1"}
    _tar(tmp_path / "x.tar", content)
    manifest = index(str(tmp_path))
    assert load_index(manifest, manifest.shards[0]).keys == ("a", "c")
    assert manifest.fields.keys() == {"image", "label"}
    assert manifest.classes == ("0", "1") and verify(str(tmp_path)).problems == {}
    _tar(tmp_path / "y.tar", {"a\udcff.jpg": b"1"})
    with pytest.raises(DataError, match=r"y\.tar: a name is not UTF-8: 'a.udcff'"):
        index(str(tmp_path))
    (tmp_path / "ids").mkdir()
    _tar(tmp_path / "ids" / "y.tar", {"d.jpg": b"1", "d.cls": b"1234567890"})
    with pytest.raises(DataError, match="these are no class numbers"):
        index(str(tmp_path / "ids"))


def test_fields_side_by_side():
    both = [frozenset({"jpg", "png", "cls"}), frozenset({"jpg", "seg.png"})]
    assert fields_apart(both) == {"image": ("jpg",), "label": ("cls",), "png": ("png",), "seg.png": ("seg.png",)}
    assert fields_apart([frozenset({"jpg"}), frozenset({"png"})]) == {"image": ("jpg", "png")}


def test_the_image_of_an_index_may_be_named(tmp_path):
    """Pairs of images, of which one is to be trained on."""
    content = {}
    for i in range(3):
        content |= {f"{i}.input.jpg": encoded(picture(i), "JPEG"), f"{i}.png": png(i)}
    _tar(tmp_path / "x.tar", content)
    manifest = index(str(tmp_path), image="input.jpg")
    assert manifest.fields == {"image": ("input.jpg",), "png": ("png",)}
    sizes = [len(content[f"{i}.input.jpg"]) for i in range(3)]
    measure = manifest.statistics["measures"]["image_bytes"]
    assert (measure["count"], measure["sum"], measure["max"]) == (3, sum(sizes), max(sizes))
    assert verify(str(tmp_path), decode=1).problems == {}
    store = open_store(tmp_path)
    found = list(items(store, read_manifest(store), ("image",)))
    assert [item.fields["image"] for item in found] == [content[f"{i}.input.jpg"] for i in range(3)]
