"""Reading members, in any order and within a budget; damaged shards are in test_damage.py."""

import os
import tarfile

import numpy as np
import pytest

from data_prep.index import index
from pipeline.data import storage
from pipeline.data.reader import Reader, SampleError
from pipeline.data.storage import open_storage
from tests.unit.data.shards import members, write_data

SIZES = [3, 0, 4, 1]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path, SIZES)


def open_reader(data, fields, optional=(), budget=10**6):
    return Reader(data, fields, optional, open_storage(data), budget)


def read(reader, ids):
    """Members or errors, in the order asked for."""
    found = {}
    for part in reader.read(np.array(ids)):
        for row, one in zip(part.rows.tolist(), part.found, strict=True):
            is_error = isinstance(one, SampleError)
            found[row] = one if is_error else {name: bytes(data) for name, data in one.items()}
    return [found[row] for row in range(len(ids))]


def expected(sample):
    return {"image": members(sample)["png"], "label": members(sample)["cls"]}


def damage(path, offset, content):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)


def header_of(path, name):
    with tarfile.open(path) as tar:
        return next(m.offset for m in tar if m.name == name)


@pytest.mark.parametrize("budget", [1, 700, 10**6])
@pytest.mark.parametrize("piece", [1, 1500, 10**6])
@pytest.mark.parametrize("ids", [[7, 0, 3, 6, 2, 1, 5, 4], [0, 1, 2, 3, 4, 5, 6, 7], [5], [2, 2, 6, 2]])
def test_members_in_any_order_budget_and_pieces(data, ids, budget, piece, monkeypatch):
    monkeypatch.setattr(storage.Local, "piece", piece)
    reader = open_reader(data, ("image", "label"), budget=budget)
    assert read(reader, ids) == [expected(i) for i in ids]
    reader.close()


def test_no_more_than_the_budget_is_held(data):
    sizes = [len(members(i)["png"]) + 1 for i in range(8)]
    reader = open_reader(data, ("image", "label"), budget=2 * max(sizes))
    parts = list(reader.read(np.arange(8)))
    assert len(parts) > 2
    assert all(sum(sizes[row] for row in part.rows) <= 3 * max(sizes) for part in parts)
    reader.close()


def test_few_files_stay_open(data, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    reader = open_reader(data, ("label",))
    for sample in (0, 3, 7, 0, 7, 3):
        assert read(reader, [sample])[0] == {"label": members(sample)["cls"]}
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


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
    reader = open_reader(data, ("image", "label"))
    assert any(isinstance(found, SampleError) for found in read(reader, [3, 4, 5, 6]))
    reader.close()


def test_index_of_existing_tars_knows_bit_rot(tmp_path):
    """What ``sluice prep index`` writes is enough to notice it."""
    write_data(tmp_path, [6])
    for name in ("manifest.json", "sizes.json", "x-000000.idx"):
        os.unlink(tmp_path / name)
    path = os.path.join(tmp_path, "x-000000.tar")
    reader = open_reader(index(str(tmp_path)), ("label",))
    assert read(reader, [2, 4]) == [{"label": b"2"}, {"label": b"4"}]
    damage(path, header_of(path, "000004.cls") + 512, b"5")
    assert "'label' is not what was indexed" in str(read(reader, [4])[0])
    reader.close()


def test_optional_fields(tmp_path):
    def make(number):
        return {"cls": b"%d" % number} | ({"png": b"p%d" % number} if number % 2 else {})

    data = write_data(tmp_path, [4], make)
    reader = open_reader(data, ("label",), ("image",))
    assert [sorted(m) for m in read(reader, [0, 1, 2, 3])] == [["label"], ["image", "label"]] * 2
    reader.close()
    reader = open_reader(data, (), ("image",))
    found = read(reader, [0, 1])
    assert "it has no field 'image', only label" in str(found[0]) and found[1] == {"image": b"p1"}
    reader.close()


def test_sample_without_a_field_names_those_it_has(tmp_path):
    def make(number):
        return members(number) if number != 2 else {"cls": b"1"}

    reader = open_reader(write_data(tmp_path, [4], make), ("image", "label"))
    assert "sample '000002': it has no field 'image', only label" in str(read(reader, [1, 2])[1])
    reader.close()
