"""What folders mean: splits, classes or neither; and what is refused."""

from itertools import product

import pytest

from data_prep.sources.layout import Layout, layout_of, split_named
from pipeline.core.errors import ConfigError, DataError


def paths(*folders):
    return [f"{folder}/{i}.png" for folder in folders for i in range(5)]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            ("train", "Train", "TRAIN", "training", "trn", "train2017", "train_2014", "training_set", "trainset"),
        ),
        ("val", ("val", "VAL", "valid", "Validation", "dev", "val2017", "val_images", "dev-set", "evaluation")),
        ("test", ("test", "Testing", "test2015", "test_data", "testset")),
        (None, ("cat", "trains", "trainer", "value", "devil", "tester", "contest", "unlabeled", "2017", "set", "")),
    ],
)
def test_usual_names_of_splits(split, names):
    assert {name: split_named(name) for name in names} == dict.fromkeys(names, split)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Validation"), ("val", "test"), ("train",), ("dev",)])
def test_folders_of_splits(names):
    layout = layout_of([p for n in names for p in paths(f"{n}/cat", f"{n}/dog")])
    assert layout.splits == {name: split_named(name) for name in names}
    assert layout.labelled == set(layout.splits.values())
    path = f"{names[-1]}/dog/deep/3.png"
    assert (layout.split(path), layout.place(path)) == (split_named(names[-1]), ("dog", ""))


def test_a_split_may_lack_the_classes_that_others_have():
    """Test sets are published flat."""
    layout = layout_of([*paths("train/cat", "train/dog"), *paths("test")])
    assert layout.labelled == {"train"}
    assert layout.place("test/1.png") == ("", "") and layout.place("train/cat/1.png") == ("cat", "")
    flat = layout_of(paths("train", "val"))
    assert flat.splits == {"train": "train", "val": "val"} and not flat.labelled


def test_strays():
    layout = layout_of([*paths("train/cat", "train/dog", "val/cat"), "logo.png", "train/sheet.png"])
    assert layout.place("logo.png") == ("", "beside the folders of the splits") and layout.split("logo.png") is None
    assert layout.place("train/sheet.png") == ("", "beside the folders of the classes")
    assert layout.place("val/cat/1.png") == ("cat", "")


def test_folders_of_classes():
    layout = layout_of(paths("bus/front", "car", "tree"))
    assert layout == Layout(labelled=frozenset([""]))
    assert layout.place("bus/front/1.png") == ("bus", "")
    train = layout_of(paths("bus", "train", "car"))
    assert not train.splits and train.place("train/1.png") == ("train", ""), "a train among vehicles"


def test_no_folders_no_classes():
    assert layout_of(["1.png", "2.png"]) == Layout()
    img2dataset = [f"{shard:05d}/{shard:05d}{i:04d}.jpg" for shard in range(3) for i in range(9)]
    assert layout_of(img2dataset) == Layout()
    assert layout_of([*img2dataset, "00001/other.jpg"]).labelled, "these are somebody's classes"
    assert layout_of(paths("0001", "0002")).labelled and layout_of(paths("00001", "00002")).labelled


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (("train/cat", "val/cat", "unlabeled"), r"named like splits \(train, val\) and not \(unlabeled\)"),
        (("train", "val", "cat"), r"named like splits \(train, val\) and not \(cat\)"),
        (("train/cat", "cat"), r"named like splits \(train\) and not \(cat\)"),
        (("val/cat", "Validation/cat"), r"several folders are val: Validation, val"),
        (("bottle/train/good", "bottle/test/bad", "cable/train/good"), r"each folder \(bottle, cable\) holds splits"),
    ],
)
def test_what_could_be_this_or_that_is_refused(found, reason):
    with pytest.raises(DataError, match=reason):
        layout_of(paths(*found))
    assert layout_of(paths(*found), "classes").labelled == {""} and layout_of(paths(*found), "flat") == Layout()


def test_pictures_beside_folders_are_strays_only_while_they_are_few():
    for classes, loose in product(range(1, 4), range(1, 5)):
        found = [*paths(*(f"class{i}" for i in range(classes))), *(f"{i}.png" for i in range(loose))]
        if loose < classes:
            assert layout_of(found).labelled
        else:
            with pytest.raises(DataError, match=f"{loose} images lie beside"):
                layout_of(found)
    with pytest.raises(DataError, match="5 images lie beside the folders in train"):
        layout_of([*paths("train/cat", "train/dog", "train"), *paths("val/cat")])
    with pytest.raises(DataError, match="2 images lie beside the folders of the splits"):
        layout_of([*paths("train/cat", "val/cat"), "a.png", "b.png"])


def test_what_is_asked_for():
    layout = layout_of([*paths("train/cat", "unlabeled"), "a.png", "b.png"], "splits")
    assert layout.splits == {"train": "train", "unlabeled": "unlabeled"} and layout.labelled == {"train"}
    assert layout.place("a.png")[1] == "beside the folders of the splits"
    assert layout_of(paths("train/cat", "val/cat"), "classes").place("train/cat/1.png") == ("train", "")
    with pytest.raises(ConfigError, match="auto, splits, classes or flat, not 'tree'"):
        layout_of([], "tree")
