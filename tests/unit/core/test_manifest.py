"""The manifest: what is written is read back, and damage is an error."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import DataError
from pipeline.core.manifest import (
    Manifest,
    Shard,
    ShardIndex,
    index_bytes,
    load,
    load_index,
    parse,
    parse_index,
    save,
    sizes_json,
)

HEX = "0123456789abcdef"
MANIFEST = Manifest(
    root="/x",
    shards=(Shard("a.tar", 3, 5000, "ab" * 32), Shard("b.tar", 0, 10240, "cd" * 32)),
    fields={"image": ("jpg", "png"), "label": ("cls",)},
    classes=("cat", "dog"),
    statistics={"samples": 3},
    made={"parts": []},
)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(0, 10**12), st.text(HEX, min_size=64, max_size=64)), max_size=5
    ),
    st.lists(st.text(), max_size=4, unique=True),
    st.dictionaries(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3), max_size=4),
)
def test_round_trip(shards, classes, fields):
    manifest = Manifest(
        root="r",
        shards=tuple(Shard(f"x-{i:06d}.tar", *s) for i, s in enumerate(shards)),
        fields={k: tuple(v) for k, v in fields.items()},
        classes=tuple(classes),
    )
    back = parse(manifest.as_json(), "r", "here")
    assert back == manifest
    assert list(back.fields) == list(manifest.fields)
    assert (
        "domain" not in manifest.as_json() and parse(replace(manifest, domain="ink").as_json(), "r", "").domain == "ink"
    )
    assert back.starts[-1] == back.samples == sum(s[0] for s in shards)
    assert json.loads(sizes_json(back)) == {s.name: s.samples for s in manifest.shards}


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pop("shards"),
        lambda b: b.pop("fields"),
        lambda b: b.pop("fingerprint"),
        lambda b: b.pop("tokenizer"),
        lambda b: b.update(format="other"),
        lambda b: b.update(version=99),
        lambda b: b.update(statistics=[]),
        lambda b: b.update(classes=[1]),
        lambda b: b.update(shards={"a": 1}),
        lambda b: b.update(fields=["image"]),
        lambda b: b["shards"][0].update(samples=4),
        lambda b: b["shards"][0].update(samples=-1),
        lambda b: b["shards"][0].update(samples=True),
        lambda b: b["shards"][0].update(samples="3"),
        lambda b: b["shards"][0].update(sha256="ff" * 32),
        lambda b: b["shards"][0].update(sha256=None),
        lambda b: b["shards"][0].update(name="../a.tar"),
        lambda b: b["shards"][0].update(name="/a.tar"),
        lambda b: b["shards"][0].update(name="b.tar"),
        lambda b: b["shards"][0].update(extra=1),
        lambda b: b["shards"].pop(),
    ],
)
def test_damage_is_an_error(change):
    body = json.loads(MANIFEST.as_json())
    assert parse(json.dumps(body), "/x", "here") == MANIFEST
    change(body)
    with pytest.raises(DataError, match="here"):
        parse(json.dumps(body), "/x", "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "<html>", MANIFEST.as_json()[:-20]])
def test_not_a_manifest(text):
    with pytest.raises(DataError, match="here"):
        parse(text, "/x", "here")


def test_save_and_load(tmp_path):
    save(MANIFEST, tmp_path)
    assert load(tmp_path) == replace(MANIFEST, root=str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "sizes.json"]
    with pytest.raises(DataError, match="no manifest"):
        load(tmp_path / "missing")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path)


def test_fingerprint_is_of_the_samples_only():
    assert replace(MANIFEST, made={"other": 1}, root="/y").fingerprint == MANIFEST.fingerprint
    assert replace(MANIFEST, shards=MANIFEST.shards[:1]).fingerprint != MANIFEST.fingerprint
    assert replace(MANIFEST, fields={"image": ("jpg",)}).fingerprint != MANIFEST.fingerprint


INDEX = ShardIndex(("a", "b c", "d/\u00e4"), np.arange(6).reshape(3, 2) * 10, np.full((3, 2), 5))


def test_index_round_trip(tmp_path):
    data = index_bytes(INDEX, MANIFEST.shards[0], ("png", "cls"))
    assert data == index_bytes(INDEX, MANIFEST.shards[0], ("png", "cls"))
    (tmp_path / "a.idx").write_bytes(data)
    back = load_index(replace(MANIFEST, root=str(tmp_path)), MANIFEST.shards[0])
    assert back.keys == INDEX.keys
    np.testing.assert_array_equal(back.offset, INDEX.offset)
    np.testing.assert_array_equal(back.size, INDEX.size)
    with pytest.raises(DataError, match="no index"):
        load_index(replace(MANIFEST, root=str(tmp_path)), MANIFEST.shards[1])


def test_fields_are_made_of_extensions():
    offset = np.array([[512, -1, 2048], [-1, 4000, 4500], [-1, 4600, -1]])
    index = replace(INDEX, offset=offset, size=np.where(offset < 0, -1, 5))
    data = index_bytes(index, MANIFEST.shards[0], ("png", "jpg", "cls"))
    fields = {"label": ("cls",), "caption": ("txt",), "image": ("jpg", "png")}
    back = parse_index(data, MANIFEST.shards[0], fields, "here")
    np.testing.assert_array_equal(back.offset, [[2048, -1, 512], [4500, -1, 4000], [-1, -1, 4600]])
    assert (back.size[:, 1] == -1).all()
    assert parse_index(data, MANIFEST.shards[0], {}, "here").offset.shape == (3, 0)


def test_index_damage_is_an_error():
    shard = MANIFEST.shards[0]
    data = index_bytes(INDEX, shard, ("png", "cls"))
    for bad in (b"", b"garbage", data[:100], data[:-30]):
        with pytest.raises(DataError, match="here"):
            parse_index(bad, shard, MANIFEST.fields, "here")
    for other in (
        replace(shard, sha256="00" * 32),
        replace(shard, samples=4),
        replace(shard, bytes=54),
    ):
        with pytest.raises(DataError, match="here"):
            parse_index(data, other, MANIFEST.fields, "here")
