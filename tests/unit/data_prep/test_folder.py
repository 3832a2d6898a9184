"""Folders: classes, sidecars, splits, and names that try to misbehave."""

import contextlib
import json
import os
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.describe import sheet
from data_prep.options import Options
from data_prep.sources.folder import FolderSource
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import encoded, members, picture, png, stock_reader, tree
from tests.unit.data_prep.test_build import lines


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_sub_folders_are_classes(tmp_path):
    write(tmp_path / "in", {f"{c}/{i}.png": png(i) for c in ("dog", "cat") for i in range(6)})
    write(tmp_path / "in", {"cat/deep/x.JPG": _jpeg(), ".hidden/a.png": png(), "cat/.b.png": png(), "dog/note.md": ""})
    built = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({"val": 0.3}, shard_samples=3))
    assert built.manifests["train"].classes == ("cat", "dog")
    samples = stock_reader(tmp_path / "out/train") + stock_reader(tmp_path / "out/val")
    assert len(samples) == 13
    for sample in samples:
        assert sample["cls"] == (b"0" if sample["__key__"].startswith("cat/") else b"1")
        name = f"{sample['__key__']}.png" if "png" in sample else "cat/deep/x.JPG"
        assert sample.get("png", sample.get("jpg")) == (tmp_path / "in" / name).read_bytes()


def _jpeg():
    return encoded(picture(), "JPEG")


def test_splits_as_folders(tmp_path):
    write(tmp_path / "in", {f"{s}/{c}/{i}.png": png(i) for s in ("train", "val") for c in "ab" for i in range(2)})
    built = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options())
    assert {s: m.samples for s, m in built.manifests.items()} == {"train": 4, "val": 4}
    assert built.manifests["val"].classes == ("a", "b")


def test_what_lies_beside_the_folders_of_splits_changes_nothing(tmp_path):
    """As imagenette2 is published; pictures there are rejected, not lost."""
    write(tmp_path, {f"{s}/{c}/{s}{c}.png": png(i) for i, (s, c) in enumerate(product(("train", "val"), "ab"))})
    write(tmp_path, {"noisy_imagenette.csv": "x", "README.md": "x", "logs/run.txt": "", "logo.png": png(9)})
    write(tmp_path, {"__MACOSX/train/a/x.png": png(), "val/.ipynb_checkpoints/x.png": png(), "@eaDir/x.png": png()})
    source = FolderSource(tmp_path)
    assert source.classes == ("a", "b") and source.others == {"csv": 1, "md": 1, "txt": 1}
    rows = {r.identity: (r.split, r.label) for r in source}
    assert rows.pop("logo.png") == (None, None)
    assert rows == {f"{s}/{c}/{s}{c}.png": (s, i) for s in ("train", "val") for i, c in enumerate("ab")}
    built = build(source, tmp_path / "out", Options({}))
    assert {s: m.samples for s, m in built.manifests.items()} == {"train": 2, "val": 2}
    assert [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")] == ["beside the folders of the splits"]


def test_one_stray_picture_does_not_take_the_labels(tmp_path):
    write(tmp_path / "in", {"a/1.png": png(1), "b/2.png": png(2), "preview.png": png(3)})
    built = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    assert (built.manifests["train"].classes, built.counts.samples) == (("a", "b"), 2)
    (reject,) = lines(tmp_path / "out/rejects.jsonl")
    assert (reject["source"], reject["reason"]) == ("preview.png", "beside the folders of the classes")


def test_as_many_pictures_beside_folders_as_folders_are_unclear(tmp_path):
    write(tmp_path, {"a/1.png": png(1), "2.png": png(2)})
    with pytest.raises(DataError, match=r"1 images lie beside .*\(a\): --layout classes .* --layout flat"):
        FolderSource(tmp_path)
    source = FolderSource(tmp_path, layout="flat")
    assert source.classes == () and [r.label for r in source] == [None, None]
    source = FolderSource(tmp_path, layout="classes")
    assert source.classes == ("a",) and {r.identity: r.label for r in source} == {"a/1.png": 0, "2.png": None}


def test_what_img2dataset_wrote_as_files_has_no_classes(tmp_path):
    for shard, number in product(range(2), range(3)):
        key = f"{shard:05d}{number:04d}"
        files = {"jpg": _jpeg(), "txt": f"caption {key}", "json": json.dumps({"key": key, "status": "success"})}
        write(tmp_path / "in", {f"{shard:05d}/{key}.{extension}": content for extension, content in files.items()})
    write(tmp_path / "in", {"00000_stats.json": "{}", "00000.parquet": b"PAR1"})
    built = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    manifest = built.manifests["train"]
    assert (manifest.classes, list(manifest.fields)) == ((), ["image", "caption", "metadata"])
    assert members(tmp_path / "out/train")["00001/000010002.txt"] == b"caption 000010002"


def test_the_order_is_decided_by_names_and_the_seed(tmp_path, monkeypatch):
    write(tmp_path, {f"{c}/{i}.png": png() for c in "ab" for i in range(9)})
    plain = [r.identity for r in FolderSource(tmp_path, shuffle=False)]
    assert plain == sorted(plain)
    orders = {seed: [r.identity for r in FolderSource(tmp_path, seed=seed)] for seed in range(3)}
    assert len({*map(tuple, orders.values()), tuple(plain)}) == 4
    scandir = os.scandir

    @contextlib.contextmanager
    def backwards(folder):
        with scandir(folder) as entries:
            yield reversed(list(entries))

    for order in (backwards, scandir):  # one of them is not the order of the names
        monkeypatch.setattr(os, "scandir", order)
        assert {seed: [r.identity for r in FolderSource(tmp_path, seed=seed)] for seed in range(3)} == orders


def test_what_changes_is_noticed(tmp_path):
    """A file's content, and what was asked for."""
    write(tmp_path / "in", {f"{i}.png": png(i) for i in range(3)})
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    for other in ({"seed": 1}, {"shuffle": False}):
        with pytest.raises(ConfigError, match="other settings"):
            build(FolderSource(tmp_path / "in", **other), tmp_path / "out", Options({}))
    (tmp_path / "in/1.png").write_bytes(png(1) + b"x")
    with pytest.raises(DataError, match="input has changed"):
        build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))


def test_names_that_lie_are_mended(tmp_path):
    write(tmp_path / "in", {"a.png": png(), "b.jpg": png(1)})
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    assert members(tmp_path / "out/train") == {"a.png": png(), "b.png": png(1)}


def test_captions_as_other_systems_write_them(tmp_path):
    """Lines may end in two characters; a "caption" in JSON that is no text is metadata only."""
    write(tmp_path / "in", {"a.png": png(1), "a.txt": "one\r\ntwo\r\n", "b.png": png(2), "b.json": '{"caption": 5}'})
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    content = members(tmp_path / "out/train")
    assert content["a.txt"] == b"one\ntwo" and "b.txt" not in content
    assert json.loads(content["b.json"]) == {"caption": 5}


def test_flat_with_sidecars(tmp_path):
    files = {"a.png": png(1), "a.txt": "a caption\n", "b.png": png(2), "b.json": '{"caption": "from json", "n": 1}'}
    write(
        tmp_path / "in",
        files | {"c.png": png(3), "c.txt": "text wins", "c.json": '{"caption": "not"}', "d.png": png(4)},
    )
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    content = members(tmp_path / "out/train")
    assert "a.cls" not in content
    assert content["a.txt"] == b"a caption" and content["b.txt"] == b"from json" and content["c.txt"] == b"text wins"
    assert json.loads(content["b.json"]) == {"caption": "from json", "n": 1}
    assert "d.txt" not in content and "d.json" not in content


def test_names_alike_stay_apart(tmp_path):
    names = ["a.png", "a.jpg", "a.PNG", "a.b.png", "a.b.c.png", "a b.png", "a%20b.png", "\u00e4.png", "a~png.png"]
    write(tmp_path / "in", {n: png(i) if n.lower().endswith("png") else _jpeg() for i, n in enumerate(names)})
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    samples = stock_reader(tmp_path / "out/train")
    assert len({s["__key__"] for s in samples}) == len(names)
    assert all(({"png", "jpg"} & set(s)) and "." not in s["__key__"] for s in samples)


@pytest.fixture
def linked(tmp_path):
    """A source with links of every kind."""
    write(tmp_path, {"secret/s.png": png(9), "secret/deep/t.png": png(8), "secret/c.txt": "words"})
    write(tmp_path, {"in/k/a.png": png(1), "in/k/b.png": png(2), "in/k/more/b.png": png(3), "in/k/loop.png/x": ""})
    source = tmp_path / "in"
    for name, target in {
        "k/outside.png": tmp_path / "secret/s.png",
        "k/inside.png": "more/b.png",
        "k/nothing.png": "nowhere.png",
        "k/itself.png": "itself.png",
        "k/a.txt": tmp_path / "secret/c.txt",
        "folder": tmp_path / "secret",
        "k/up": "..",
        "k/more/k2": tmp_path / "in/folder",
    }.items():
        (source / name).symlink_to(target)
    (tmp_path / "secret/back").symlink_to(source)
    return source


def test_links_to_outside_and_to_folders_are_rejected_and_say_so(linked, tmp_path):
    built = build(FolderSource(linked), tmp_path / "out", Options({}))
    assert built.manifests["train"].classes == ("k",)
    assert (built.counts.samples, built.counts.inputs) == (3, 10)
    assert {r["source"]: r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")} == {
        "k/outside.png": "a link to outside of the source; --links follows it",
        "k/nothing.png": "a link to nothing",
        "k/itself.png": "a link to nothing",
        "k/a.png": ".txt is a link to outside of the source; --links follows it",
        "folder": "a link to a folder; --links follows it",
        "k/up": "a link to a folder that it is in",
        "k/more/k2": "a link to a folder; --links follows it",
    }


def test_links_are_followed_where_that_is_asked_for_but_not_in_circles(linked, tmp_path):
    built = build(FolderSource(linked, links=True), tmp_path / "out", Options({}))
    assert built.manifests["train"].classes == ("folder", "k")
    content = members(tmp_path / "out/train")
    images = {name.removesuffix(".png"): data for name, data in content.items() if name.endswith(".png")}
    assert images == {
        "folder/s": png(9),
        "folder/deep/t": png(8),
        "k/a": png(1),
        "k/b": png(2),
        "k/inside": png(3),
        "k/more/b": png(3),
        "k/more/k2/s": png(9),
        "k/more/k2/deep/t": png(8),
        "k/outside": png(9),
    }
    assert content["k/a.txt"] == b"words"
    reasons = {r["source"]: r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")}
    nothing, circle = "a link to nothing", "a link to a folder that it is in"
    assert reasons == {
        "k/nothing.png": nothing,
        "k/itself.png": nothing,
        "k/up": circle,
        "folder/back": circle,
        "k/more/k2/back": circle,
    }


def test_splits_that_are_links(tmp_path):
    write(tmp_path, {"a/k/a.png": png(1), "b/k/b.png": png(2)})
    (tmp_path / "in").mkdir()
    for split, target in {"train": "a", "val": "b"}.items():
        (tmp_path / "in" / split).symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"no images in .*, only train, a link to a folder; --links follows it"):
        FolderSource(tmp_path / "in")
    built = build(FolderSource(tmp_path / "in", links=True), tmp_path / "out", Options())
    assert {name: m.samples for name, m in built.manifests.items()} == {"train": 1, "val": 1}


def test_files_that_are_no_images_by_their_names_are_counted(tmp_path):
    write(tmp_path, {"k/a.png": png(1), "k/a.txt": "its caption", "k/.b.png": "", "k/a.json": "{}"})
    write(tmp_path, {"k/x.heic": "", "k/y.heic": "", "k/orphan.txt": "of no image", "README": ""})
    source = FolderSource(tmp_path)
    assert source.total == 1 and source.others == {"heic": 2, "txt": 1, "": 1}


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        FolderSource(tmp_path / "missing")
    with pytest.raises(DataError, match="no images"):
        FolderSource(tmp_path)


def test_inputs_that_are_no_images_are_rejected(tmp_path):
    """One bad file among many stops no build; a pipe is not waited for."""
    write(tmp_path / "in", {f"{name}.png": png(i) for i, name in enumerate("abc")})
    write(tmp_path / "in", {"b.json": "{", "c.json": "[1]", "d.png/e.md": ""})
    (tmp_path / "in/f.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "in/g.png")
    built = build(FolderSource(tmp_path / "in", shuffle=False), tmp_path / "out", Options({}))
    assert (built.counts.samples, built.counts.inputs) == (1, 5)
    reasons = {r["key"]: r["reason"].split(":")[0] for r in lines(tmp_path / "out/rejects.jsonl")}
    assert reasons == {
        "b": "metadata is not JSON",
        "c": "metadata is no table",
        "f": "a link to nothing",
        "g": "not a regular file",
    }


def test_names_that_are_not_utf8(tmp_path):
    """In a class, in an image that is rejected, in one that is written."""
    for name, content in {
        b"\xff/a.png": png(1),
        b"b/\xfe.png": png(2),
        b"b/\xfe.txt": b"caf",
        b"b/\xfd.png": b"x",
    }.items():
        path = os.path.join(os.fsencode(tmp_path / "in"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    built = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}))
    assert built.manifests["train"].classes == ("\\udcff", "b")
    assert [r["source"] for r in lines(tmp_path / "out/rejects.jsonl")] == ["b/\\udcfd.png"]
    content = members(tmp_path / "out/train")
    assert (content["b/%FE.png"], content["b/%FE.txt"], content["%FF/a.cls"]) == (png(2), b"caf", b"0")
    assert build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({})).manifests == built.manifests
    assert "udcff" in sheet(str(tmp_path / "out/train"), 2)[1].encode().decode()


def test_files_too_large_for_an_image_are_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as f:
        f.truncate(2**40)
    with pytest.raises(DataError, match="1099511627776 bytes, most is"):
        build(FolderSource(tmp_path), tmp_path / "out", Options({}))


def test_a_file_that_vanishes_stops_the_build_and_it_goes_on(tmp_path):
    write(tmp_path / "in", {f"{i}.png": png(i) for i in range(9)})
    build(FolderSource(tmp_path / "in"), tmp_path / "whole", Options({}, shard_samples=2))
    source = FolderSource(tmp_path / "in")
    victim = tmp_path / "in" / list(source)[6].identity
    moved = tmp_path / "moved.png"
    os.rename(victim, moved)
    with pytest.raises(DataError, match=rf"{victim.name}.*same command to go on"):
        build(source, tmp_path / "out", Options({}, shard_samples=2))
    os.rename(moved, victim)
    build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({}, shard_samples=2))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda p: p not in (".", "..") and len(p.encode()) < 60
)
NAME = st.tuples(
    st.lists(PART, max_size=3), PART, st.sampled_from(["png", "PNG", "jpg", "jpeg", "txt", "json", "cls", "x"])
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAME, min_size=1, max_size=8), st.sampled_from([1, 3]), st.sampled_from(["flat", "classes"]))
def test_random_folders(tmp_path_factory, names, shard_samples, layout):
    root = tmp_path_factory.mktemp("random")
    (root / "in").mkdir()
    wanted = 0
    for i, (folders, stem, extension) in enumerate(names):
        path = root.joinpath("in", *folders, f"{stem}.{extension}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.exists()
            path.write_bytes(png(i) if extension.lower() == "png" else _jpeg() if extension[0] == "j" else b"text")
        except (NotADirectoryError, IsADirectoryError, FileExistsError):
            continue
        hidden = any(p.startswith(".") for p in (*folders, path.name))
        hidden = hidden or {"__MACOSX", "@eaDir", "lost+found"} & set(folders)
        wanted += not known and not hidden and extension.lower() in ("png", "jpg", "jpeg")
    try:
        source = FolderSource(root / "in", layout=layout)
        built = build(source, root / "out", Options({}, shard_samples=shard_samples))
    except DataError as error:
        assert "no images" in str(error) or ".json" in str(error)
        return
    assert {p.name for p in root.iterdir()} == {"in", "out"}
    assert {p.name for p in (root / "out").iterdir()} == {"train", "build.json", "rejects.jsonl"}
    samples = stock_reader(root / "out/train")
    assert len(samples) == len({s["__key__"] for s in samples}) == built.counts.samples
    assert built.counts.inputs == wanted and (layout == "classes" or built.counts.samples == wanted)
    for sample in samples:
        assert set(sample) - {"__key__", "__url__", "__local_path__"} <= {"png", "jpg", "cls", "txt", "json"}
        assert ".." not in sample["__key__"].split("/") and not sample["__key__"].startswith("/")
