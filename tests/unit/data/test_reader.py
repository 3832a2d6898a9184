"""Reading members: what is there, and each kind of damage with shard and sample named."""

import os
import tarfile

import pytest

from pipeline.core.errors import DataError
from pipeline.data import reader as module
from pipeline.data.reader import Reader, SampleError
from tests.unit.data.shards import members, write_data

SIZES = [3, 0, 4, 1]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, SIZES)


def damage(path, offset, content):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)


def header_of(path, name):
    with tarfile.open(path) as tar:
        return next(m.offset for m in tar if m.name == name)


def test_members_of_every_sample(data):
    reader = Reader(data, ("image", "label"))
    for sample in (7, 0, 3, 6, 2, 1, 5, 4):
        found = reader.read(sample)
        assert {k: bytes(v) for k, v in found.items()} == {
            "image": members(sample)["png"],
            "label": members(sample)["cls"],
        }
    reader.close()


def test_few_shards_stay_open(data, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(data, ("label",))
    for sample in (0, 3, 7, 0, 7, 3):
        assert bytes(reader.read(sample)["label"]) == members(sample)["cls"]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, bytes(512), "no tar header"),
        (0, b"<!DOCTYPE html>", "checksum"),
        (148, b"0000000\0", "checksum"),
        (300, b"\xff", "checksum"),
    ],
    ids=["zeroed block", "overwritten", "wrong checksum", "one bit"],
)
def test_damaged_header_is_that_samples_error(data, offset, content, reason):
    path = os.path.join(data.root, "x-000002.tar")
    damage(path, header_of(path, "000004.png") + offset, content)
    reader = Reader(data, ("image", "label"))
    with pytest.raises(SampleError, match=rf"x-000002.tar, sample '000004': field 'image'.*{reason}"):
        reader.read(4)
    assert len(reader.read(5)) == 2
    reader.close()


def test_index_of_another_content_is_noticed(data):
    path = os.path.join(data.root, "x-000002.tar")
    samples = [(f"{i:06d}", {"cls": b"123"[: i % 3 + 1], "png": members(i)["png"]}) for i in range(3, 7)]
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                name = os.path.join(data.root, "part")
                with open(name, "wb") as f:
                    f.write(content)
                tar.add(name, f"{key}.{extension}")
    os.truncate(path, data.shards[2].bytes)
    reader = Reader(data, ("image", "label"))
    with pytest.raises(SampleError, match=r"x-000002\.tar"):
        for sample in range(3, 7):
            reader.read(sample)
    reader.close()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: os.truncate(p, 1024), "has 1024 bytes, its manifest says"),
        (lambda p: os.truncate(p, 0), "has 0 bytes"),
        (lambda p: damage(p, os.path.getsize(p), bytes(512)), "it was cut or changed"),
        (os.unlink, "cannot open shard .*No such file"),
        (lambda p: os.unlink(p.replace(".tar", ".idx")), "no index at .*renew it with `sluice prep index`"),
        (lambda p: os.truncate(p.replace(".tar", ".idx"), 100), "x-000002.idx is damaged"),
    ],
    ids=["cut", "empty", "longer", "missing", "no index", "cut index"],
)
def test_damaged_shard_is_an_error_naming_it(data, spoil, reason):
    spoil(os.path.join(data.root, "x-000002.tar"))
    reader = Reader(data, ("label",))
    reader.read(0)
    with pytest.raises(DataError, match=reason) as found:
        reader.read(3)
    assert "x-000002" in str(found.value) and not isinstance(found.value, SampleError)
    reader.close()


def test_sample_without_a_field_names_those_it_has(tmp_path):
    def make(number):
        return members(number) if number != 2 else {"cls": b"1"}

    reader = Reader(write_data(tmp_path, [4], make), ("image", "label"))
    with pytest.raises(SampleError, match="sample '000002': it has no field 'image', only label"):
        reader.read(2)
    reader.close()
