"""Reading members, in any order and within a budget; damaged shards are in test_damage.py."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.index import index
from pipeline.core.errors import DataError
from pipeline.core.manifest import index_name
from pipeline.data import locate, storage
from pipeline.data.access import open_storage
from pipeline.data.reader import Reader, SampleError
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


@pytest.mark.parametrize("copies", [1, 3])
def test_no_more_than_the_budget_is_held(data, copies, monkeypatch):
    """Where a storage holds the bytes several times, parts are the smaller."""
    monkeypatch.setattr(storage.Local, "copies", copies)
    sizes = [len(members(i)["png"]) + 1 for i in range(8)]
    reader = open_reader(data, ("image", "label"), budget=2 * copies * max(sizes))
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


def test_few_indexes_are_kept(data, monkeypatch):
    monkeypatch.setattr(locate, "_INDEXES", 2)
    reader = open_reader(data, ("label",))
    for sample in (0, 3, 7, 0, 7, 3):
        assert read(reader, [sample, 0]) == [{"label": members(i)["cls"]} for i in (sample, 0)]
        assert len(reader._locator._kept) <= 2
    reader.close()


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_that_changed_its_size_after_the_start_is_noticed(data, change):
    os.truncate(os.path.join(data.root, "x-000002.tar"), data.shards[2].bytes + change)
    reader = open_reader(data, ("label",))
    with pytest.raises(DataError, match=rf"x-000002\.tar has {data.shards[2].bytes + change} bytes, its manifest says"):
        read(reader, [3])
    reader.close()


def rewrite_header(path, name, size, checksum="{:06o}\0 "):
    """Another size in a member's header, as bytes, with the checksum that goes with it."""
    at = header_of(path, name)
    header = bytearray(Path(path).read_bytes()[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = checksum.format(sum(header)).encode().ljust(8, b"\0")
    damage(path, at, header)


OTHER_FORMS = {
    "blanks": (lambda n: b"%11o " % n, "{:6o}\0 "),
    "few digits": (lambda n: (b"%o" % n).ljust(12, b"\0"), "{:o} \0"),
    "binary": (lambda n: b"\x80" + n.to_bytes(11, "big"), "{:06o}\0 "),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_headers_that_other_programs_write_are_good(data, form):
    size, checksum = OTHER_FORMS[form]
    rewrite_header(f"{data.root}/x-000002.tar", "000004.png", size(len(members(4)["png"])), checksum)
    reader = open_reader(data, ("image", "label"))
    assert read(reader, [4]) == [expected(4)]
    reader.close()


@pytest.mark.parametrize("form", ["{:011o}\0", "{:011o}7"])
@pytest.mark.parametrize("more", [0, 1])
def test_a_header_of_another_size_than_the_indexs_is_noticed(data, form, more):
    size = form.format(len(members(4)["png"]) + more).encode()
    rewrite_header(f"{data.root}/x-000002.tar", "000004.png", size)
    reader = open_reader(data, ("image", "label"))
    (found,) = read(reader, [4])
    if form.endswith("7") or more:
        assert "x-000002.tar, sample '000004': a tar header says another size than the index" in str(found)
    else:
        assert found == expected(4)
    reader.close()


def test_samples_may_lie_in_a_shard_in_any_order(data):
    """As where the members of several are woven together: here the index counts them from the last to the first."""
    path = Path(data.root) / index_name(data.shards[2].name)
    with np.load(path) as body:
        tables = {name: body[name] for name in body.files}
    for name in ("offset", "size", "crc32"):
        tables[name] = tables[name][::-1]
    tables["keys"] = np.frombuffer(b"\0".join(tables["keys"].tobytes().split(b"\0")[::-1]), np.uint8)
    with open(path, "wb") as f:
        np.savez(f, **tables)
    reader = open_reader(data, ("label",))
    assert read(reader, [3, 4, 5, 6, 7]) == [{"label": members(i)["cls"]} for i in (6, 5, 4, 3, 7)]
    reader.close()


def test_an_index_without_crc_32_is_good(data):
    """Those of older data sets have none."""
    for shard in data.shards:
        path = Path(data.root) / index_name(shard.name)
        with np.load(path) as body:
            tables = {name: body[name] for name in body.files if name != "crc32"}
        with open(path, "wb") as f:
            np.savez(f, **tables)
    reader = open_reader(data, ("image", "label"))
    assert read(reader, range(8)) == [expected(i) for i in range(8)]
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
    # A header that is damaged is its own sample's matter.
    damage(f"{data.root}/x-000000.tar", header_of(f"{data.root}/x-000000.tar", "000001.cls"), b"<!DOCTYPE html>")
    both = open_reader(data, ("label",), ("image",))
    damaged, whole = read(both, [1, 2])
    assert isinstance(damaged, SampleError) and whole == {"label": b"2"}
    both.close()
    assert "it has no field 'image', only label" in str(found[0]) and found[1] == {"image": b"p1"}
    reader.close()


def test_sample_without_a_field_names_those_it_has(tmp_path):
    def make(number):
        return members(number) if number != 2 else {"cls": b"1"}

    reader = open_reader(write_data(tmp_path, [4], make), ("image", "label"))
    assert "sample '000002': it has no field 'image', only label" in str(read(reader, [1, 2])[1])
    reader.close()
