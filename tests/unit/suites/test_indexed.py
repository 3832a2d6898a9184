"""Image folders and torchvision's sets become shards in the cache: once, the right split, and only whole ones."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from pipeline.config.schema import EvalData, Image
from pipeline.core import manifest as manifests
from pipeline.core.cache import VARIABLE
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.evaluation import open_eval
from pipeline.suites import indexed
from pipeline.suites.indexed import shards_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def write(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PillowImage.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two splits of three classes; "val" has two images of each, "train" three."""
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(("cat", "dog", "emu")):
            for i in range(count):
                write(tmp_path / "pets" / split / name / f"{i}.png", 80 * number + i)
    return tmp_path / "pets"


def seen(shards: str) -> dict[int, int]:
    """First pixel of each image to its label, through the stream."""
    image = Image(size=16, crop="center")
    stream = open_eval(shards, image, ("image", "label"), batch=4, workers=0)
    found = {int(i[0, 0, 0]): int(y) for batch in stream for i, y in zip(batch["image"], batch["label"], strict=True)}
    stream.close()
    return found


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if not p.name.startswith("."))


def test_a_folder_of_classes_is_read_as_it_is_and_once(folder, own_cache):
    shards = shards_of(EvalData(path=f"{folder}/val"))
    assert manifests.load(shards).classes == ("cat", "dog", "emu")
    assert seen(shards) == {80 * label + i: label for label in range(3) for i in range(2)}
    before = os.stat(Path(shards) / "manifest.json").st_ino
    assert shards_of(EvalData(path=str(folder), split="val")) == shards
    assert os.stat(Path(shards) / "manifest.json").st_ino == before and len(entries(own_cache)) == 1


def test_splits_by_name(folder):
    assert manifests.load(shards_of(EvalData(path=str(folder), split="train"))).samples == 9
    (folder / "val").rename(folder / "validation")
    assert manifests.load(shards_of(EvalData(path=str(folder), split="val"))).samples == 6
    for path, split, says in (
        (folder, None, r"has splits \(train, validation\); say which: {path = .*, split = 'train'}"),
        (folder, "test", "no such folders; its splits are train, validation"),
        (folder / "train", "val", "its splits are none"),
    ):
        with pytest.raises(ConfigError, match=says):
            shards_of(EvalData(path=str(path), split=split))


def test_what_is_shards_already_is_used_where_it_lies(glyphs, own_cache):
    assert shards_of(EvalData(path=str(glyphs / "val"))) == str(glyphs / "val")
    assert shards_of(EvalData(path=str(glyphs), split="val")) == str(glyphs / "val")
    assert shards_of(EvalData(path="s3://bucket/val")) == "s3://bucket/val"
    with pytest.raises(ConfigError, match="name the folder of the split itself"):
        shards_of(EvalData(path=str(glyphs / "val"), split="train"))
    assert not own_cache.exists()


def test_a_folder_that_holds_nothing_is_left_to_whoever_reads_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(DataError, match="no manifest at"):
            manifests.load(shards_of(EvalData(path=str(tmp_path / name))))


@pytest.mark.parametrize("change", ["one more", "one less", "another content", "renamed"])
def test_what_changes_is_read_anew(change, folder):
    before = shards_of(EvalData(path=f"{folder}/val"))
    first = folder / "val" / "cat" / "0.png"
    if change == "one more":
        write(folder / "val" / "cat" / "9.png", 9)
    elif change == "one less":
        first.unlink()
    elif change == "another content":
        size, old = first.stat().st_size, first.read_bytes()
        first.write_bytes(old[:-1] + b"x")
        assert first.stat().st_size == size
    else:
        first.rename(first.with_name("7.png"))
    assert shards_of(EvalData(path=f"{folder}/val")) != before


@pytest.mark.parametrize("damage", ["shard cut", "no manifest", "no index", "half built"])
def test_a_damaged_entry_is_not_used(damage, folder):
    shards = Path(shards_of(EvalData(path=f"{folder}/val")))
    expected = seen(str(shards))
    if damage == "shard cut":
        tar = next(shards.glob("*.tar"))
        os.truncate(tar, tar.stat().st_size // 2)
    elif damage == "half built":
        shutil.rmtree(shards)
        (shards / ".build").mkdir(parents=True)
    else:
        next(shards.glob("manifest.json" if damage == "no manifest" else "*.idx")).unlink()
    assert seen(shards_of(EvalData(path=f"{folder}/val"))) == expected


def test_images_that_cannot_be_used_are_named_and_nothing_is_kept(folder, own_cache):
    (folder / "val" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 6 images of .*val cannot be used, first dog/0: .*sluice prep build"):
        shards_of(EvalData(path=f"{folder}/val"))
    assert entries(own_cache) == []


def test_a_layout_that_could_be_two_things_says_what_to_do(folder):
    for i in range(5):
        write(folder / "val" / f"{i}.png", 7)
    with pytest.raises(DataError, match="can be said to `sluice prep build folder`"):
        shards_of(EvalData(path=f"{folder}/val"))


def test_a_cache_without_room_is_named(folder, monkeypatch):
    monkeypatch.setattr(indexed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(DataError, match=f"has room for 1e-08 GB; set {VARIABLE}"):
        shards_of(EvalData(path=f"{folder}/val"))


def test_progress_is_shown(folder):
    told: list[tuple[str, int, int]] = []
    shards_of(EvalData(path=f"{folder}/val"), lambda *a: told.append(a))
    assert told[-1] == (f"reading {folder}/val", 6, 6)


@pytest.fixture
def cifar(tmp_path) -> Path:
    """CIFAR-10 as torchvision finds it on the disk, of so few images that its hashes are not what they were."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / "sets" / CIFAR10.base_folder
    base.mkdir(parents=True)
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        rows = np.full((2, 3072), number, np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [number, number + 1]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return tmp_path / "sets"


def test_a_set_of_torchvision_by_split(cifar, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    shards = {s: shards_of(EvalData(path=str(cifar), torchvision="CIFAR10", split=s)) for s in ("train", "test")}
    assert [manifests.load(s).samples for s in shards.values()] == [10, 2]
    assert manifests.load(shards["test"]).classes == tuple("abcdefghij")
    assert set(seen(shards["test"])) == {5}
    with pytest.raises(ConfigError, match="CIFAR10 has splits; say which"):
        shards_of(EvalData(path=str(cifar), torchvision="CIFAR10"))
    with pytest.raises(ConfigError, match="has 'train' and 'test'"):
        shards_of(EvalData(path=str(cifar), torchvision="CIFAR10", split="valid"))
    with pytest.raises(ConfigError, match="did you mean 'CIFAR10'"):
        shards_of(EvalData(path=str(cifar), torchvision="CIFAR11", split="test"))
    with pytest.raises(ConfigError, match="Caltech101 has no splits"):
        shards_of(EvalData(path=str(cifar), torchvision="Caltech101", split="test"))
    with pytest.raises(DataError, match=r"STL10.*Unknown value 'all'.*Valid values"):
        shards_of(EvalData(path=str(cifar), torchvision="STL10", split="all"))
