"""What components may know of the data, and that it survives a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from pipeline.config.schema import Beside, Data, Image, Source
from pipeline.core.manifest import load, save
from pipeline.core.protocols import DataFacts, SetFacts
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from tests.unit.data.shards import FIELDS, members, write_data


def test_it_knows_samples_classes_and_first_id_of_every_data_set(tmp_path):
    for name, shards in {"a": [3, 4], "b": [5], "c": [2]}.items():
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, shards, members, FIELDS)
        if name == "c":
            save(replace(load(tmp_path / name), classes=("left", "right")), tmp_path / name)
    first = (Source(path=str(tmp_path / "a")), Source(path=str(tmp_path / "b")))
    beside = {"near": Beside(path=str(tmp_path / "b")), "far": Beside(path=str(tmp_path / "c"))}
    data = Data(train=first, image=Image(size=(8, 6)), beside=beside)
    known = facts(data, load(first))
    classes, inside = load(tmp_path / "a").classes, tmp_path.name
    assert classes and known == DataFacts(
        (8, 6),
        classes,
        samples=12,
        views=((8, 6),),
        domains=(f"{inside}/a", f"{inside}/b"),
        sources=((0, 0), (7, 1)),
        beside={
            "near": SetFacts(5, classes, (f"{inside}/b",), 12, ((12, 0),)),
            "far": SetFacts(2, ("left", "right"), (f"{inside}/c",), 17, ((17, 0),)),
        },
    )
    assert DataFacts.of(json.loads(json.dumps(known.plain()))) == known


def test_it_knows_the_size_of_every_view(tmp_path):
    write_data(tmp_path, [3], members, FIELDS)
    crops = ({"count": 2}, {"count": 3, "size": (4, 6)})
    for image, expected in (
        (Image(size=8, views=2), ((8, 8), (8, 8))),
        (Image.model_validate({"size": 8, "crops": crops}), ((8, 8), (8, 8), (4, 6), (4, 6), (4, 6))),
    ):
        known = facts(Data(train=str(tmp_path), image=image), load(tmp_path))
        assert known.views == expected and DataFacts.of(json.loads(json.dumps(known.plain()))) == known


def test_domains_are_named_by_the_source_then_by_the_manifest_and_sources_may_share_one(tmp_path):
    for name, shards in {"a": [3], "b": [5], "c": [2]}.items():
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, shards, members, FIELDS)
    save(replace(load(tmp_path / "b"), domain="ink"), tmp_path / "b")
    paths = [(str(tmp_path / name), domain) for name, domain in [("a", "print"), ("b", None), ("c", "print")]]
    train = tuple(Source(path=path, domain=domain) for path, domain in paths)
    known = facts(Data(train=train), load(train))
    assert known.domains == ("print", "ink") and known.sources == ((0, 0), (3, 1), (8, 0))
    # Some of the samples alone are still of that domain.
    some = Data(train=paths[1][0], keep=str(tmp_path / "some.txt"))
    (tmp_path / "some.txt").write_text("0\n1\n")
    assert facts(some, open_data(some)).domains == ("ink",)


def test_facts_in_checkpoints_of_earlier_versions_are_read():
    assert DataFacts.of({"image_size": [8, 6], "classes": ["a", "b"]}) == DataFacts((8, 6), ("a", "b"))


def test_a_data_set_beside_the_first_has_not_the_name_of_a_field():
    with pytest.raises(ValidationError, match=r"beside\.text has the name of a field"):
        Data(train="x", fields=("image", "text"), beside={"text": Beside(path="y")})
