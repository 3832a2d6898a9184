"""Adding to a data set: old shards stay as they are, keys stay unique, classes keep their numbers."""

import json
import shutil
from dataclasses import replace
from itertools import product

import pytest

from data_prep.build import build
from data_prep.labels import Known
from data_prep.options import Duplicates, Options
from data_prep.record import Inline
from data_prep.sources.folder import FolderSource
from data_prep.store import LocalStore
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from tests.unit.data_prep.samples import ListSource, encoded, inline, members, picture, png, tree
from tests.unit.data_prep.test_build import Killed, _dying, lines
from tests.unit.data_prep.test_verbs import run

OPTIONS = Options({"val": 0.3}, shard_samples=3)


def parts():
    records = [replace(r, label=i % 2) for i, r in enumerate(inline(24))]
    return ListSource(records[:12], ("a", "b")), ListSource(records[10:], ("a", "b", "c"), "second")


def test_append_adds_shards_and_touches_none(tmp_path):
    first, second = parts()
    build(first, tmp_path, OPTIONS)
    before = {k: v for k, v in tree(tmp_path).items() if k.endswith((".tar", ".idx"))}
    built = build(second, tmp_path, OPTIONS, append=True)
    after = tree(tmp_path)
    assert all(after[name] == content for name, content in before.items())
    assert sum(m.samples for m in built.manifests.values()) == 24
    assert built.manifests["train"].classes == ("a", "b", "c")
    assert built.manifests["train"].statistics["samples"] == built.manifests["train"].samples
    assert [(r["part"], r["key"]) for r in lines(tmp_path / "rejects.jsonl")] == [(1, "0010"), (1, "0011")]
    for split in built.manifests:
        assert verify(str(tmp_path / split), decode=1).problems == {}
    assert len(members(tmp_path / "train") | members(tmp_path / "val")) == 48
    assert build(second, tmp_path, OPTIONS, append=True).manifests == built.manifests, "again changes nothing"
    assert tree(tmp_path) == after


def test_append_killed_anywhere(tmp_path, monkeypatch):
    first, second = parts()
    build(first, tmp_path / "whole", OPTIONS)
    with monkeypatch.context() as patch:
        changes = _dying(patch, 10**9)
        build(second, tmp_path / "whole", OPTIONS, append=True)
    for at in range(0, len(changes), 3):
        out = tmp_path / f"{at}"
        build(first, out, OPTIONS)
        with monkeypatch.context() as patch:
            _dying(patch, at)
            with pytest.raises(Killed):
                build(second, out, OPTIONS, append=True)
        build(second, out, OPTIONS, append=True)
        assert tree(out) == tree(tmp_path / "whole")
    assert LocalStore.close.__name__ == "close"


def test_places_get_a_prefix(tmp_path):
    build(ListSource(inline(3), positional=True), tmp_path, Options({}))
    build(ListSource(inline(3), positional=True, name="more"), tmp_path, Options({}), append=True)
    assert sorted(members(tmp_path / "train")) == [f"{p}{i:04d}.png" for p in ("", "1-") for i in range(3)]


def test_a_folder_that_grew(tmp_path):
    for name in ("b/1.png", "c/2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(png(len(name)))
    first = build(FolderSource(tmp_path / "in"), tmp_path / "out", Options({})).manifests["train"]
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/3.png").write_bytes(png(3))
    grown = FolderSource(tmp_path / "in", known=Known(first.classes))
    second = build(grown, tmp_path / "out", Options({}), append=True).manifests["train"]
    assert second.classes == ("b", "c", "a") and second.samples == 3
    assert members(tmp_path / "out/train")["a/3.cls"] == b"2"


@pytest.mark.parametrize("action", ["drop", "report"])
def test_duplicates_of_what_was_there(tmp_path, action, monkeypatch):
    options = replace(OPTIONS, duplicates=Duplicates(action, 3))
    old, new = inline(12), inline(24)[12:]
    image = picture(4, (96, 72))
    old[4] = replace(old[4], image=Inline(encoded(image)))
    new[3] = replace(new[3], image=old[2].image)
    new[7] = replace(new[7], image=Inline(encoded(image.resize((80, 60)), "JPEG", quality=80)))
    new[9] = replace(new[9], image=new[1].image)
    build(ListSource(old), tmp_path / "out", options)
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    built = build(ListSource(new, name="new"), tmp_path / "out", options, append=True)
    found = lines(tmp_path / "out" / ("rejects.jsonl" if action == "drop" else "duplicates.jsonl"))
    assert [(r["key"], r["reason"].split(")")[0], r["reason"].split()[-1]) for r in found] == [
        ("0015", "duplicate (bytes", "0002"),
        ("0019", found[1]["reason"].split(")")[0], "0004"),
        ("0021", "duplicate (bytes", "0013"),
    ]
    assert "looks alike" in found[1]["reason"]
    assert sum(m.samples for m in built.manifests.values()) == (21 if action == "drop" else 24)
    with monkeypatch.context() as patch:
        _dying(patch, 14)
        with pytest.raises(Killed):
            build(ListSource(new, name="new"), tmp_path / "killed", options, append=True)
    build(ListSource(new, name="new"), tmp_path / "killed", options, append=True)
    assert tree(tmp_path / "killed") == tree(tmp_path / "out")


def test_what_was_not_looked_for_cannot_be_compared(tmp_path):
    for before, kind in ((Duplicates(), "duplicates"), (Duplicates("drop"), "look-alikes")):
        build(ListSource(inline(3)), tmp_path / kind, replace(OPTIONS, duplicates=before))
        there = tree(tmp_path / kind / "train")
        with pytest.raises(ConfigError, match=f"without looking for {kind}"):
            options = replace(OPTIONS, duplicates=Duplicates("drop", 3))
            build(ListSource(inline(6)[3:], name="new"), tmp_path / kind, options, append=True)
        assert tree(tmp_path / kind / "train") == there
        build(ListSource(inline(6)[3:], name="new"), tmp_path / kind, OPTIONS, append=True)


def test_what_cannot_be_added_to(tmp_path):
    with pytest.raises(ConfigError, match="nothing to append to"):
        build(ListSource(inline(3)), tmp_path / "new", OPTIONS, append=True)
    build(ListSource(inline(3), ("a", "b")), tmp_path / "x", OPTIONS)
    with pytest.raises(ConfigError, match=r"number 0 is 'a' there, 'b' now; added data keeps the numbers"):
        build(ListSource(inline(6), ("b", "a"), "other"), tmp_path / "x", OPTIONS, append=True)


def test_notes_that_were_half_removed_are_not_in_the_way(tmp_path, monkeypatch):
    """A kill while they are removed may leave any of them, and takes the plan away first or last."""
    first, second = parts()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "remove", lambda store, folder: None)
        build(first, tmp_path / "out", OPTIONS)
    notes = sorted(p.name for p in (tmp_path / "out/.build").iterdir())
    assert len([n for n in notes if n.startswith("train.")]) > 1
    build(first, tmp_path / "clean", OPTIONS)
    build(second, tmp_path / "clean", OPTIONS, append=True)
    for number, left in enumerate(notes):
        out = shutil.copytree(tmp_path / "out", tmp_path / f"{number}")
        for name in set(notes) - {left}:
            (out / ".build" / name).unlink()
        build(second, out, OPTIONS, append=True)
        assert tree(out) == tree(tmp_path / "clean"), left


def test_an_addition_whose_input_changed_may_begin_again(tmp_path, monkeypatch):
    """What is said must not cost the data set that was there."""
    first, second = parts()
    build(first, tmp_path / "out", OPTIONS)
    with monkeypatch.context() as patch:
        _dying(patch, 12)
        with pytest.raises(Killed):
            build(second, tmp_path / "out", OPTIONS, append=True)
    changed = ListSource(inline(30)[14:], ("a", "b", "c"), "second")
    with pytest.raises(DataError, match=r"new folder, or remove .*/out/\.build, to begin the addition again"):
        build(changed, tmp_path / "out", OPTIONS, append=True)
    shutil.rmtree(tmp_path / "out/.build")
    built = build(changed, tmp_path / "out", OPTIONS, append=True)
    assert sum(m.samples for m in built.manifests.values()) == 28
    assert all(verify(str(tmp_path / "out" / split)).problems == {} for split in built.manifests)


def test_shards_of_another_origin_are_not_written_over(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / split).mkdir(parents=True)
        (tmp_path / split / split / f"{split}-000000.tar").write_bytes(b"somebody's")
        with pytest.raises(ConfigError, match=f"files of another origin, {split}/"):
            build(ListSource(inline(12)), tmp_path / split, OPTIONS)
        assert (tmp_path / split / split / f"{split}-000000.tar").read_bytes() == b"somebody's"


def test_data_is_added_where_there_is_no_training_split(tmp_path):
    for folder, names in (("in", "ab"), ("more", "bc")):
        for split, name in product(("val", "test"), names):
            (tmp_path / folder / split / name).mkdir(parents=True)
            (tmp_path / folder / split / name / f"{folder}.png").write_bytes(png(len(folder) + ord(name)))
    run("build", "folder", tmp_path / "in", tmp_path / "out")
    run("build", "folder", tmp_path / "more", tmp_path / "out", "--append")
    assert load(tmp_path / "out/test").classes == ("a", "b", "c") and load(tmp_path / "out/val").samples == 4


def test_a_part_killed_at_its_very_end_is_not_in_the_way(tmp_path, monkeypatch):
    """What it noted must not be taken for the next part's, though the next one has the same description."""
    first, second = ListSource(inline(7)), ListSource(inline(16)[7:], name="grows")
    third = ListSource([*second.records, *inline(23)[16:]], name="grows")
    remove, out = LocalStore.remove, tmp_path / "out"
    for number, source in enumerate((first, second), 1):
        build(source, tmp_path / "whole", OPTIONS, append=number > 1)

        def dying(store, folder, number=number):
            if len(json.loads((out / "build.json").read_text())["parts"]) == number:
                raise Killed
            remove(store, folder)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "remove", dying)
            with pytest.raises(Killed):
                build(source, out, OPTIONS, append=number > 1)
        assert list(out.glob(".build/*.json"))
    build(third, tmp_path / "whole", OPTIONS, append=True)
    build(third, out, OPTIONS, append=True)
    assert tree(out) == tree(tmp_path / "whole")


def test_new_classes_are_numbered_by_name_after_those_that_are_known(tmp_path):
    for letter in "hbgkcafdje":
        (tmp_path / letter).mkdir()
        (tmp_path / letter / "1.png").write_bytes(png(1))
    assert FolderSource(tmp_path).classes == tuple("abcdefghjk")
    assert FolderSource(tmp_path, known=Known(("f", "z", "b"))).classes == ("f", "z", "b", *"acdeghjk")
