"""Sources that read what others made: tars and torchvision's data sets."""

import json
import os
import pickle

import numpy as np
import pytest

from data_prep.build import build
from data_prep.labels import Known
from data_prep.options import ImageOptions, Options
from data_prep.record import Rejected
from data_prep.sources.tars import TarsSource
from data_prep.sources.torchvision import TorchvisionSource
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import encoded, members, opened, picture, png, stock_reader
from tests.unit.data_prep.test_build import lines
from tests.unit.data_prep.test_scan import _tar


@pytest.fixture
def tars(tmp_path):
    """Two tars with keys that occur in both, and one of them cut."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        content = {}
        for j in range(4):
            key = f"class{j % 2}/{j}"
            content |= {f"{key}.png": png(10 * i + j), f"{key}.cls": f"{j}".encode(), f"{key}.txt": b"text"}
            content |= {f"{key}.json": b'{"n": 1}', f"{key}.npy": b"numbers"}
        _tar(tmp_path / "in" / f"{i}.tar", content | {"only.txt": b"no image", "bad.png": png(), "bad.json": b"{"})
    return tmp_path / "in"


def test_tars_are_repacked(tars, tmp_path):
    built = build(TarsSource([tars]), tmp_path / "out", Options({}, shard_samples=3))
    assert built.counts.samples == 8
    assert built.manifests["train"].classes == ("0", "1", "2", "3")
    samples = stock_reader(tmp_path / "out/train")
    assert len({s["__key__"] for s in samples}) == 8
    for sample in samples:
        tar, _, j = sample["__key__"].split("/")
        assert sample["cls"].decode() == j and sample["png"] == png(10 * int(tar) + int(j))
        assert (sample["txt"], sample["npy"], json.loads(sample["json"])) == (b"text", b"numbers", {"n": 1})
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert [r.split(":")[0] for r in reasons] == ["no image, only txt", "metadata is not JSON"] * 2


def test_tars_are_not_read_more_than_needed(tars, monkeypatch):
    """Headers and what is asked for; images are left to the workers."""
    read, pread = [], os.pread

    def counting(file, size, at):
        read.append(size)
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", counting)
    assert sum(1 for _ in TarsSource([tars], "none")) == 2 * 6
    assert max(read) <= 10240, "the end-of-archive blocks are the longest"


def test_names_that_no_header_holds_are_rejected(tmp_path):
    long = {"k" * 90 + ".png": png(1), "k" * 90 + ".segmentation_mask.png": png(2)}
    wrong = {**long, "b.json": b"{", "b.png": png(4), "c.png": b"x", "c.\udcff": b"x"}
    _tar(tmp_path / "x.tar", {"a.png": png(3), **wrong})
    built = build(TarsSource([tmp_path / "x.tar"]), tmp_path / "out", Options({}))
    assert list(members(tmp_path / "out/train")) == ["00000/a.png"]
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert [r.split(":")[0] for r in reasons] == [
        "name too long for a tar's header",
        "metadata is not JSON",
        "name that is not UTF-8",
    ]
    assert built.counts.inputs == 4


def test_keys_with_dots_follow_webdataset(tmp_path):
    _tar(tmp_path / "x.tar", {"a/b.1.png": png(), "a/b.png": png(), "a/b.npy": b"x"})
    (record,) = TarsSource([tmp_path / "x.tar"])
    assert record.identity == "a/b" and set(record.more) == {"1.png", "npy"}


def test_only_tars_of_a_folder(tmp_path):
    _tar(tmp_path / "a.tar", {"dog/b/c/x.png": png(), "y.png": png(1)})
    (tmp_path / "b.tar.part").write_bytes(b"half")
    source = TarsSource([tmp_path], "folder")
    assert source.classes == ("dog",) and [r.label for r in source] == [0, None], "the first folder alone"


@pytest.mark.parametrize(("length", "problem"), [(88, ""), (89, "name too long")])
def test_names_as_long_as_a_header_holds(tmp_path, length, problem):
    """00000/, the key, a dot: with 88 letters exactly 100 bytes."""
    _tar(tmp_path / "x.tar", {"abcde.png": png(), f"abcde.{'e' * length}": b"x"})
    (record,) = TarsSource([tmp_path / "x.tar"])
    if problem:
        with pytest.raises(Rejected, match=problem):
            record.image.read()
    else:
        build(TarsSource([tmp_path / "x.tar"]), tmp_path / "out", Options({}))
        assert max(map(len, members(tmp_path / "out/train"))) == 100


def test_labels_from_folders(tmp_path):
    _tar(tmp_path / "x.tar", {"dog/a.png": png(1), "cat/b.png": png(2), "cat/c.png": png(3)})
    built = build(TarsSource([str(tmp_path / "{x,x}.tar")], "folder"), tmp_path / "out", Options({}))
    assert built.manifests["train"].classes == ("cat", "dog") and built.counts.samples == 6
    assert sorted(v for k, v in members(tmp_path / "out/train").items() if k.endswith("cls")) == [b"0"] * 4 + [b"1"] * 2


def test_a_damaged_tar_is_one_reject(tmp_path):
    _tar(tmp_path / "0.tar", {f"{i}.png": png(i) for i in range(4)})
    _tar(tmp_path / "1.tar", {f"{i}.png": png(i + 9) for i in range(4)})
    data = (tmp_path / "0.tar").read_bytes()
    from data_prep.walk import walk

    (tmp_path / "0.tar").write_bytes(data[: list(walk(data))[2].offset - 512])
    (tmp_path / "2.tar").write_bytes(b"")
    built = build(TarsSource([tmp_path]), tmp_path / "out", Options({}))
    # the sample before the cut may be half of one, so it is part of what is lost
    assert (built.counts.samples, built.counts.rejects) == (5, 2)
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert "no end-of-archive" in reasons[0] and "empty file" in reasons[1]


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="no tar at"):
        TarsSource([tmp_path / "no.tar"])
    with pytest.raises(DataError, match="no tars"):
        TarsSource([tmp_path])
    with pytest.raises(ConfigError):
        TarsSource([tmp_path], "other")


def test_torchvision_from_memory(tmp_path):
    """CIFAR10's own files, made here: five batches and a test batch of pickled pixels."""
    import hashlib

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {}
    for name in [n for n, _ in CIFAR10.train_list + CIFAR10.test_list]:
        pixels[name] = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [3, 9]}))
    names = [f"class {i}" for i in range(10)]
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": names}))
    patched = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in (*pixels, CIFAR10.meta["filename"])}
    train, test, meta = CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta
    try:
        CIFAR10.train_list = [[n, patched[n]] for n, _ in train]
        CIFAR10.test_list = [[n, patched[n]] for n, _ in test]
        CIFAR10.meta = {**meta, "md5": patched[meta["filename"]]}
        splits = {"train": {"train": True}, "val": {"train": False}}
        built = build(TorchvisionSource("CIFAR10", str(tmp_path), splits), tmp_path / "out", Options())
    finally:
        CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = train, test, meta
    assert {s: m.samples for s, m in built.manifests.items()} == {"train": 10, "val": 2}
    assert built.manifests["train"].classes == tuple(names)
    content = members(tmp_path / "out/val")
    found = np.asarray(opened(content["val-00000001.png"]))
    np.testing.assert_array_equal(found, pixels["test_batch"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert content["val-00000001.cls"] == b"9"


def test_torchvision_from_files_keeps_their_bytes(tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(encoded(picture(len(name)), "JPEG"))
    source = TorchvisionSource("ImageFolder", str(tmp_path / "in"), {"train": {}})
    build(source, tmp_path / "out", Options({}))
    content = members(tmp_path / "out/train")
    assert content["train-00000001.jpg"] == (tmp_path / "in/b/2.jpg").read_bytes()


class Array:
    """What has ``tolist``, as tensors have."""

    def __init__(self, value):
        self.value = value

    def tolist(self):
        return self.value


def test_targets_of_torchvision(tmp_path, monkeypatch):
    """A number is a label, a text a caption, several texts the first and the others; all else is metadata."""
    from torchvision import datasets

    targets = [3, Array(4), "text", ["one", "two"], Array([0.5, 1]), {"box": 1}]

    class FakeData(list):
        def __init__(self, root):
            super().__init__((picture(i), target) for i, target in enumerate(targets))
            self.append(("no image", 1))

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    records = list(TorchvisionSource("FakeData", str(tmp_path), {"train": {}}))
    assert [(r.label, r.caption, r.metadata) for r in records[:-1]] == [
        (3, None, None),
        (4, None, None),
        (None, "text", None),
        (None, "one", {"captions": ["one", "two"]}),
        (None, None, {"target": [0.5, 1]}),
        (None, None, {"target": {"box": 1}}),
    ]
    with pytest.raises(Rejected, match="not an image but str"):
        records[-1].image.read()


def test_files_of_torchvision_are_what_they_hold(tmp_path):
    for name, data in {"a/1.jpg": png(), "a/2.png": png(1)}.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    source = TorchvisionSource("ImageFolder", str(tmp_path / "in"), {"train": {}})
    build(source, tmp_path / "out", Options({}))
    assert not lines(tmp_path / "out/rejects.jsonl")
    assert {k: v for k, v in members(tmp_path / "out/train").items() if k.endswith(".png")} == {
        "train-00000000.png": png(),
        "train-00000001.png": png(1),
    }


def test_splits_of_torchvision_are_compared_and_remembered(tmp_path, monkeypatch):
    from torchvision import datasets

    class FakeData(list):
        def __init__(self, root, number=0):
            super().__init__([(picture(number), 0)])
            self.classes = ["a", "b" * number]

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    with pytest.raises(DataError, match="FakeData: val has other classes than the first split: '', b"):
        TorchvisionSource("FakeData", str(tmp_path), {"train": {}, "val": {"number": 1}})
    build(TorchvisionSource("FakeData", str(tmp_path), {"train": {}}), tmp_path / "out", Options({}))
    with pytest.raises(ConfigError, match="other settings"):
        build(TorchvisionSource("FakeData", str(tmp_path), {"train": {"number": 0}}), tmp_path / "out", Options({}))


def test_classes_that_are_groups_of_words(tmp_path, monkeypatch):
    """Of ImageNet: the first word, unless another class has it too; then all of them, and with an id if need be."""
    from torchvision import datasets

    class FakeData(list):
        def __init__(self, root):
            super().__init__([(picture(i), i) for i in range(5)])
            self.classes = [("tench", "Tinca tinca"), ("crane",), ("crane",), ("maillot",), ("maillot", "tank suit")]
            self.wnids = ["n01440764", "n02012849", "n03126707", "n03710637", "n03710721"]

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    source = TorchvisionSource("FakeData", str(tmp_path), {"train": {}})
    cranes = ("crane (n02012849)", "crane (n03126707)")
    assert source.classes == ("tench", *cranes, "maillot", "maillot, tank suit")
    assert [r.label for r in source] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("listed", [True, False])
def test_torchvision_without_names_of_classes(tmp_path, monkeypatch, listed):
    """Numbers are classes of their own, as those of SVHN; -1 stands for none, as in STL10."""
    from torchvision import datasets

    class FakeData(list):
        def __init__(self, root):
            super().__init__((picture(i), label) for i, label in enumerate((2, 0, -1, 2)))
            if listed:
                self.labels = np.asarray([2, 0, -1, 2])

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    source = TorchvisionSource("FakeData", str(tmp_path), {"train": {}})
    built = build(source, tmp_path / "out", Options({}))
    assert (built.manifests["train"].classes, built.counts.samples) == (("0", "1", "2"), 4)
    assert [r.label for r in source] == [2, 0, None, 2]


def test_torchvision_by_the_names_of_another_set(tmp_path, monkeypatch):
    for name in ("cat/1.png", "dog/2.png", "fox/3.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(png(len(name)))
    known = Known(("fox", "cat"), closed=True)
    source = TorchvisionSource("ImageFolder", str(tmp_path / "in"), {"train": {}}, known)
    assert (source.classes, [r.label for r in source]) == (("fox", "cat"), [1, None, 0])
    build(source, tmp_path / "out", Options({}))
    (reject,) = lines(tmp_path / "out/rejects.jsonl")
    assert reject["source"] == str(tmp_path / "in/dog/2.png"), "the file is named"


def test_a_torchvision_set_without_a_folder(tmp_path):
    source = TorchvisionSource("FakeData", str(tmp_path), {"train": {"size": 3, "image_size": (3, 8, 8)}})
    assert len(list(source)) == 3 == source.total


def test_torchvision_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'CIFAR10'"):
        TorchvisionSource("CIFAR01", str(tmp_path), {"train": {}})
    with pytest.raises(DataError, match="is not at"):
        TorchvisionSource("MNIST", str(tmp_path), {"train": {}})
    with pytest.raises(ConfigError, match="it takes"):
        TorchvisionSource("MNIST", str(tmp_path), {"train": {"fold": 3}})


def test_the_image_may_be_a_member_that_is_not_obvious(tmp_path):
    content = {"a.input.jpg": encoded(picture(1), "JPEG"), "a.target.jpg": encoded(picture(2), "JPEG"), "b.png": png(3)}
    _tar(tmp_path / "x.tar", content)
    first, second = TarsSource([tmp_path / "x.tar"])
    with pytest.raises(Rejected, match=r"no image, only input.jpg, target.jpg; --image-field input.jpg would take"):
        first.image.read()
    assert second.image.read() == png(3)
    built = build(TarsSource([tmp_path / "x.tar"], image="input.jpg"), tmp_path / "out", Options({}))
    assert list(built.manifests["train"].fields) == ["image", "target.jpg"]
    found = members(tmp_path / "out/train")
    assert found == {"00000/a.jpg": content["a.input.jpg"], "00000/a.target.jpg": content["a.target.jpg"]}
    assert [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")] == ["no .input.jpg, only png"]


def test_two_files_of_one_name_are_not_written(tmp_path):
    """The image becomes a PNG beside which there is one already."""
    _tar(
        tmp_path / "x.tar", {"a.jpg": encoded(picture(1), "JPEG"), "a.png": png(2), "b.jpg": encoded(picture(), "JPEG")}
    )
    build(TarsSource([tmp_path / "x.tar"]), tmp_path / "out", Options({}, image=ImageOptions("png")))
    assert list(members(tmp_path / "out/train")) == ["00000/b.png"]
    (reject,) = lines(tmp_path / "out/rejects.jsonl")
    assert reject["reason"] == "two files .png: the image, and another one of the sample"


def test_captions_in_the_metadata(tmp_path):
    def sample(key, table, **more):
        return {f"{key}.png": png(ord(key)), f"{key}.json": json.dumps(table).encode(), **more}

    content = sample("a", {"text": "from json"}) | sample("b", {"text": ["one", "two"]}, **{"b.txt": b"old"})
    bad = sample("c", {"other": 1}) | sample("d", {"text": 5}) | {"e.png": png(1)}
    bad |= sample("f", {"text": ["a", "b"]}, **{"f.1.txt": b"another"})
    _tar(tmp_path / "x.tar", content | bad)
    source = TarsSource([tmp_path / "x.tar"], caption="text")
    build(source, tmp_path / "out", Options({}))
    found = {k: v for k, v in members(tmp_path / "out/train").items() if k.endswith("txt")}
    assert found == {"00000/a.txt": b"from json", "00000/b.txt": b"one", "00000/b.1.txt": b"two"} | {
        "00000/b.original.txt": b"old"
    }
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert reasons == ["no text under 'text' in the metadata"] * 3 + ["two captions .1.txt"]
    assert "caption" in source.describe() and "caption" not in TarsSource([tmp_path / "x.tar"]).describe()


def test_metadata_and_captions_come_along(tmp_path):
    _tar(tmp_path / "x.tar", {"a.png": png(), "a.json": b'{"n": 1}', "a.txt": "\u00e4".encode(), "a.cls": b"tree"})
    built = build(TarsSource([tmp_path / "x.tar"]), tmp_path / "out", Options({}, image=ImageOptions("webp")))
    content = members(tmp_path / "out/train")
    assert built.manifests["train"].classes == ("tree",)
    assert json.loads(content["00000/a.json"]) == {"n": 1} and content["00000/a.txt"].decode() == "\u00e4"
    assert content["00000/a.cls"] == b"0" and "00000/a.webp" in content
