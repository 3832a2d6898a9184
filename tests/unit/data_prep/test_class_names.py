"""A label points to the same name of a class after every verb: the images here are coloured by their class."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.tars import TarsSource
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from tests.unit.data_prep.samples import encoded, members
from tests.unit.data_prep.test_build import lines
from tests.unit.data_prep.test_scan import _tar
from tests.unit.data_prep.test_verbs import run

COLOURS = {name: 20 + 20 * i for i, name in enumerate(("1", "2", "3", "10", "11", "cat", "dog", "eel", "fox"))}


def coloured(name, number):
    return encoded(Image.new("RGB", (8, 8), (COLOURS[name], number, 0)))


def folder(root, names, first=0, each=3):
    """Class folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(first, first + each):
            (root / name / f"{i}.png").write_bytes(coloured(name, i))
    return root


def names_shown(shards):
    """For each class of a data set the names that its samples' colours stand for."""
    names = {colour: name for name, colour in COLOURS.items()}
    classes, found = load(shards).classes, {}
    content = members(shards)
    for member in content:
        key, _, extension = member.rpartition(".")
        if extension == "png":
            colour = int(np.asarray(Image.open(io.BytesIO(content[member])))[0, 0, 0])
            name = classes[int(content[f"{key}.cls"])]
            found.setdefault(name, []).append(names[colour])
    return found


def check(*shards, samples):
    found = [names_shown(s) for s in shards]
    assert all(set(shown) == {name} for one in found for name, shown in one.items()), found
    assert sum(len(shown) for one in found for shown in one.values()) == samples
    assert all(verify(str(s), decode=1).problems == {} for s in shards)


@pytest.fixture
def numbered(tmp_path, monkeypatch):
    """Class folders whose names are numbers."""
    monkeypatch.chdir(tmp_path)
    run("build", "folder", folder(tmp_path / "in", ("1", "2", "10", "11")), "out", "--split", "val=0")
    check(tmp_path / "out/train", samples=12)
    return tmp_path


def test_folders_named_by_numbers_keep_their_names(numbered):
    assert load("out/train").classes == ("1", "10", "11", "2")
    run("split", "out/train", "dealt", "--split", "val=0.4")
    check(numbered / "dealt/train", numbered / "dealt/val", samples=12)
    assert load("dealt/val").classes == ("1", "10", "11", "2")
    run("build", "tars", "out/train", "packed", "--split", "val=0")
    check(numbered / "packed/train", samples=12)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_what_is_added_goes_by_name(numbered, kind):
    source = folder(numbered / "more", ("2", "3", "11"), first=3)
    if kind == "tars":
        run("build", "folder", source, "other", "--split", "val=0")
        source = "other/train"
    run("build", kind, source, "out", "--split", "val=0", "--append")
    assert load("out/train").classes == ("1", "10", "11", "2", "3")
    check(numbered / "out/train", samples=21)


def test_a_table_added_to_such_classes(numbered):
    (numbered / "t").mkdir()
    for name in ("2", "11"):
        (numbered / f"t/{name}.png").write_bytes(coloured(name, 9))
    (numbered / "t/t.csv").write_text("image,kind\n2.png,2\n11.png,11\n")
    run("build", "table", "t/t.csv", "out", "--label", "kind", "--split", "val=0", "--append")
    check(numbered / "out/train", samples=14)
    (numbered / "t/t.csv").write_text("image,kind\n2.png,3\n11.png,2\n")
    with pytest.raises(DataError, match="labels 3 are none of them"):
        run("build", "table", "t/t.csv", "out", "--label", "kind", "--split", "val=0", "--append")


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two data sets of other classes, in shards of two samples."""
    monkeypatch.chdir(tmp_path)
    for name, classes, first in (("a", ("cat", "dog"), 0), ("b", ("dog", "eel"), 5)):
        source = folder(tmp_path / f"in-{name}", classes, first)
        run("build", "folder", source, name, "--split", "val=0", "--shard-samples", 2)
    return tmp_path


def test_merging_goes_by_name(pair):
    before = members(pair / "b/train")
    run("merge", "a/train", "b/train", "ab")
    assert load("ab").classes == ("cat", "dog", "eel")
    check(pair / "ab", samples=12)
    assert load("ab").statistics["labels"] == {"0": 3, "1": 6, "2": 3}
    assert load("ab").made["merged"][1]["renumbered"] == [1, 2] and "renumbered" not in load("ab").made["merged"][0]
    assert members(pair / "b/train") == before, "the inputs stay"
    assert (pair / "ab/000-train-000000.tar").stat().st_nlink == 2, "what stays as it is, is linked"
    run("merge", "b/train", "a/train", "ba")
    assert load("ba").classes == ("dog", "eel", "cat")
    check(pair / "ba", samples=12)
    run("merge", "ab", folder_of(pair, "fox"), "abf")
    check(pair / "abf", samples=15)


def folder_of(root, name):
    run("build", "folder", folder(root / f"in-{name}", (name,), 20), f"of-{name}", "--split", "val=0")
    return f"of-{name}/train"


def test_merging_where_one_has_the_first_classes_of_the_other_links_all(pair):
    run("build", "folder", folder(pair / "in-c", ("cat", "dog", "fox"), 40), "c", "--split", "val=0")
    run("merge", "a/train", "c/train", "ac")
    assert all(p.stat().st_nlink == 2 for p in (pair / "ac").glob("*.tar"))
    check(pair / "ac", samples=15)


@pytest.mark.parametrize("digits", [1, 2])
def test_labels_may_get_more_or_fewer_digits(pair, digits):
    """Class 0 becomes number 12, and back."""
    (pair / "many").mkdir()
    _tar(pair / "many/x.tar", {"x.png": coloured("fox", 1), "x.cls": b"11"})
    (pair / "names.txt").write_text("\n".join([*(f"c{i}" for i in range(11)), "fox"]))
    run("index", "many", "--classes", "names.txt")
    run("merge", *(("many", "b/train") if digits == 2 else ("b/train", "many")), "out")
    assert load("out").classes[12 if digits == 2 else 0] == "dog"
    check(pair / "out", samples=7)


def test_a_label_that_gets_shorter_leaves_no_digits_behind(pair):
    """The tar is the one that a writer of the new label would have made."""
    (pair / "many").mkdir()
    content = {"x.png": coloured("fox", 1), "x.cls": b"11\n", "y.png": coloured("fox", 2)}
    _tar(pair / "many/x.tar", content)
    (pair / "names.txt").write_text("\n".join([*(f"c{i}" for i in range(11)), "fox"]))
    run("index", "many", "--classes", "names.txt")
    run("merge", folder_of(pair, "fox"), "many", "out")
    _tar(pair / "wanted.tar", content | {"x.cls": b"0"})
    assert (pair / "out/001-x.tar").read_bytes() == (pair / "wanted.tar").read_bytes()


def test_a_merge_that_was_killed_before_it_wrote_labels_leaves_the_inputs_alone(pair):
    """The first try may have left a link to an input where the second one writes."""
    (pair / "ab").mkdir()
    before = {p: p.read_bytes() for p in (pair / "b/train").glob("*.tar")}
    for path in before:
        (pair / f"ab/.001-{path.name}.part").hardlink_to(path)
    run("merge", "a/train", "b/train", "ab")
    assert {p: p.read_bytes() for p in before} == before
    check(pair / "ab", samples=12)


@pytest.mark.parametrize("odd", [b"7", b"dog"])
def test_labels_of_no_class_are_not_merged_by_name(pair, odd):
    (pair / "bad").mkdir()
    _tar(pair / "bad/x.tar", {"x.png": coloured("fox", 1), "x.cls": b"0", "y.png": coloured("fox", 2), "y.cls": odd})
    (pair / "names.txt").write_text("fox\n")
    run("index", "bad", "--classes", "names.txt")
    with pytest.raises(DataError, match=f"label b'{odd.decode()}' of y is not one of 1 classes"):
        run("merge", "a/train", "bad", "out")


def test_repacking_both_goes_by_name_too(pair):
    run("build", "tars", "{a,b}/train", "both", "--split", "val=0")
    assert load("both/train").classes == ("cat", "dog", "eel")
    check(pair / "both/train", samples=12)
    run("build", "tars", "a/train", "apart", "--split", "val=0")
    run("build", "tars", "b/train", "apart", "--split", "val=0", "--append")
    check(pair / "apart/train", samples=12)


def test_names_do_not_mix_with_mere_numbers(pair, capsys):
    (pair / "plain").mkdir()
    _tar(pair / "plain/x.tar", {"x.png": coloured("dog", 9), "x.cls": b"1"})
    with pytest.raises(DataError, match=r"names of classes .* others numbers"):
        run("build", "tars", "{a,plain}", "out", "--split", "val=0")
    run("index", "plain")
    for order in (("a/train", "plain"), ("plain", "a/train")):
        with pytest.raises(DataError, match=r"of plain are only numbered, .*index plain --classes FILE"):
            run("merge", *order, "out")
    (pair / "names.txt").write_text("cat\ndog\n")
    run("index", "plain", "--classes", "names.txt")
    run("merge", "a/train", "plain", "out")
    check(pair / "out", samples=7)


def test_labels_without_classes_are_not_merged_with_others(pair):
    (pair / "words").mkdir()
    _tar(pair / "words/x.tar", {"x.png": coloured("dog", 9), "x.cls": b"dog"})
    run("index", "words")
    with pytest.raises(DataError, match=r"words has labels and no classes: .*build tars"):
        run("merge", "a/train", "words", "out")
    run("build", "tars", "words", "out", "--split", "val=0")
    run("merge", "a/train", "out/train", "merged")
    check(pair / "merged", samples=7)


def test_building_against_given_classes(pair, capsys):
    """As for a validation set that is prepared later, whose folders are not those of the training set."""
    folder(pair / "in-val", ("dog", "fox", "eel"), 50)
    run("merge", "a/train", "b/train", "ab")
    for classes in ("ab", "names.txt"):
        (pair / "names.txt").write_text("cat\ndog\neel\n")
        run("build", "folder", "in-val", f"val-{classes}", "--classes", classes, "--split", "val=0")
        assert load(f"val-{classes}/train").classes == ("cat", "dog", "eel")
        check(pair / f"val-{classes}/train", samples=6)
        reasons = [r["reason"] for r in lines(pair / f"val-{classes}/rejects.jsonl")]
        assert reasons == ["label 'fox' is not one of 3 classes"] * 3
    assert "1 of them without samples (cat)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["table", "urls", "tars", "torchvision"])
def test_every_source_takes_given_classes(pair, kind, monkeypatch):
    from launch import prep_build

    asked = []
    monkeypatch.setattr(prep_build, "run_build", lambda source, *rest, **more: asked.append(source))
    (pair / "names.txt").write_text("eel\ncat\n")
    (pair / "t.csv").write_text("image,url,kind\nx,x,cat\nx,x,fox\n")
    _tar(pair / "x.tar", {"x.png": b"", "x.cls": b"cat", "y.png": b"", "y.cls": b"fox"})
    folder(pair / "vision", ("cat", "fox"), each=1)
    what = {"tars": ("x.tar", "new"), "torchvision": ("ImageFolder", "vision", "new")}
    run("build", kind, *what.get(kind, ("t.csv", "new", "--label", "kind")), "--classes", "names.txt")
    assert asked[0].classes == ("eel", "cat")
    assert [r.label for r in asked[0]] == [1, None]
    assert "'fox' is not one of 2 classes" in [*asked[0]][1].image.reason


def test_labels_of_tars_that_are_none(tmp_path):
    """Beside a manifest digits count in its classes, and words must be among them; the rest is rejected."""
    labels = [b"1", b"0\n", b"2", b"-1", b"dog", b"fox", b"", b"\xff"]
    content = {}
    for i, label in enumerate(labels):
        content |= {f"{i}.png": coloured("cat", i), f"{i}.cls": label}
    _tar(tmp_path / "x.tar", content | {"9.png": coloured("cat", 9)})
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    run("index", tmp_path, "--classes", tmp_path / "names.txt")
    source = TarsSource([tmp_path])
    assert source.classes == ("cat", "dog")
    assert [r.label for r in source] == [1, 0, None, None, 1, None, None, None, None]
    build(source, tmp_path / "out", Options({}))
    reasons = {r["key"][-1]: r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")}
    assert reasons.pop("6") == "no label"
    assert set(reasons) == set("2357") and all("is not one of 2 classes" in r for r in reasons.values())
    assert "00000/9.png" in members(tmp_path / "out/train"), "a sample without a label member stays"


def test_manifests_above_tars_count_only_for_what_they_list(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("0", "1"):
        _tar(tmp_path / f"in/deep/{name}.tar", {f"{name}.png": coloured("cat", 1), f"{name}.cls": b"0"})
    (tmp_path / "names.txt").write_text("cat\n")
    run("index", tmp_path / "in", "--tars", "deep/0.tar", "--classes", tmp_path / "names.txt")
    assert TarsSource([tmp_path / "in/deep/0.tar"]).classes == ("cat",)
    assert TarsSource([tmp_path / "in/deep/1.tar"]).classes == ("0",)
    (tmp_path / "in/deep/manifest.json").write_text('{"manifest_version": 3}')
    assert TarsSource([tmp_path / "in/deep/1.tar"]).classes == ("0",), "another program's file"


def test_an_index_says_which_labels_are_none(tmp_path, capsys):
    _tar(tmp_path / "x.tar", {"a.png": b"x", "a.cls": b"cat", "b.png": b"x", "b.cls": b"3", "c.png": b"x"})
    run("index", tmp_path)
    assert load(tmp_path).classes == tuple("0123")
    assert "1 labels are not the number of one of 4 classes" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    run("index", tmp_path, "--classes", tmp_path / "names.txt")
    assert "2 labels are not the number of one of 2 classes: name all classes" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    with pytest.raises(ConfigError, match="lists 'cat' in line 1"):
        run("index", tmp_path, "--classes", tmp_path / "names.txt")


def test_an_index_that_is_renewed_has_classes_for_new_numbers(tmp_path):
    _tar(tmp_path / "0.tar", {"a.png": b"x", "a.cls": b"1"})
    run("index", tmp_path)
    _tar(tmp_path / "1.tar", {"b.png": b"x", "b.cls": b"4"})
    run("index", tmp_path)
    assert load(tmp_path).classes == tuple("01234")


def test_two_ways_to_write_one_name_are_one_class(tmp_path):
    for i, (split, name) in enumerate(
        (("train", "caf\u00e9"), ("val", "cafe\u0301"), ("train", "zoo"), ("val", "zoo"))
    ):
        (tmp_path / "in" / split / name).mkdir(parents=True)
        (tmp_path / "in" / split / name / f"{i}.png").write_bytes(coloured("cat", i))
    run("build", "folder", tmp_path / "in", tmp_path / "out")
    assert load(tmp_path / "out/train").classes == load(tmp_path / "out/val").classes == ("caf\u00e9", "zoo")
    assert sorted(v for k, v in members(tmp_path / "out/val").items() if k.endswith("cls")) == [b"0", b"1"]


def test_the_last_lines_say_what_was_made(tmp_path, capsys):
    folder(tmp_path / "in", ("cat", "dog"))
    (tmp_path / "in/cat/0.txt").write_text("a cat")
    run("build", "folder", tmp_path / "in", tmp_path / "out", "--split", "val=0.4")
    made = capsys.readouterr().out.splitlines()
    counts = {s: load(tmp_path / "out" / s).samples for s in ("train", "val")}
    assert [m.split("out/")[1].split(";")[0] for m in made] == [
        f"{s}: {n} samples in 1 shards" for s, n in counts.items()
    ]
    assert all("2 classes (cat, dog)" in line and "; fields image (png), label (cls)" in line for line in made)
    assert sum("caption (txt)" in line for line in made) == 1
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/x.png").write_bytes(coloured("cat", 1))
    run("build", "folder", tmp_path / "flat", tmp_path / "plain", "--split", "val=0")
    assert capsys.readouterr().out.endswith("1 samples in 1 shards; no classes; fields image (png)\n")
    run("index", tmp_path / "out/train")
    run("merge", tmp_path / "out/train", tmp_path / "out/val", tmp_path / "one")
    assert [line.count("2 classes (cat, dog)") for line in capsys.readouterr().out.splitlines()] == [1, 1]
