"""Many headers at once give what one by one gives, and what Python's tarfile finds."""

import io
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import walk as walking
from data_prep.headers import plain_run
from data_prep.scan import scan
from data_prep.walk import Damage, group, walk
from tests.unit.data_prep.samples import png

STEM = st.sampled_from(["a", "b", "dir/a", "dir.x/b", "_", "__c", "\u00e4", "k" * 90, "n" * 120, ".h", "d/.h", "two/"])
NAME = st.tuples(STEM, st.sampled_from(["jpg", "JPG", "txt", "seg.png", "a_very_long_extension", "\u00e9", ""]))


def archive(files, kind, times=None):
    """A tar of (name, content); a name that ends with "/" is a folder."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as tar:
        for i, (name, data) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.mtime = times[i % len(times)] if times else 0
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if name.endswith("/") else len(data)
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def inner():
    """A tar as data: its headers are none of the archive's."""
    return archive([("x.jpg", b"1"), ("y.jpg", b"2" * 600)], tarfile.PAX_FORMAT)


FILES = st.lists(
    st.tuples(NAME.map(lambda n: ".".join(n) if n[1] else n[0]), st.binary(max_size=1100) | st.builds(inner)),
    max_size=9,
)
KINDS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@settings(max_examples=60, deadline=None)
@example([(".h.jpg", b"1"), ("d/.h.jpg", b"2"), ("a.jpg", b"3")], tarfile.GNU_FORMAT, None, 1 << 20)
@example([("__c.jpg", b"1"), ("__c__.jpg", b"2"), ("__c__", b"3")], tarfile.GNU_FORMAT, None, 1 << 20)
@given(FILES, KINDS, st.sampled_from([None, (1.5,), (0, 1795327398.25)]), st.sampled_from([512, 1536, 1 << 20]))
def test_scan_is_walk_and_group(tmp_path_factory, files, kind, times, chunk):
    data = archive(files, kind, times)
    path = tmp_path_factory.mktemp("x") / "x.tar"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walking, "CHUNK", chunk)
        found = scan(path, (b".txt",))
    expected, problem, passed = [], "", Counter()
    try:
        for key, members in group(walk(data), passed):
            expected.append((key, {m.extension: m[1:] for m in members}))
        if passed and not expected:
            problem = f"no samples, only {', '.join(f'{n} {kind}' for kind, n in sorted(passed.items()))}: files are"
    except Damage as damage:
        problem = str(damage)
    assert found.problem.startswith(problem) and bool(found.problem) == bool(problem)
    rows = zip(*(a.tolist() for a in (found.rows.offset, found.rows.size, found.rows.crc32)), strict=True)
    columns = [
        {e: cells for e, cells in zip(found.extensions, zip(*row, strict=True), strict=True) if cells[0] >= 0}
        for row in rows
    ]
    assert list(zip(found.rows.keys, columns, strict=True)) == expected
    assert found.extensions == sorted({e for _, members in expected for e in members})
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = {m.offset_data: zlib.crc32(data[m.offset_data :][: m.size]) for m in tar if m.isfile()}
        texts = {m.offset_data for m in tar if m.isfile() and m.name.endswith(".txt")}
    assert all(theirs[offset] == crc32 for _, members in expected for offset, _, crc32 in members.values())
    assert set(found.texts) <= texts and all(data[at : at + len(t)] == t for at, t in found.texts.items())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdatasets_own_tars_are_plain(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/%d.tar", verbose=0) as sink:
        for i in range(50):
            sink.write(
                {"__key__": f"class.dir/{i:03d}", "png": png(i), "cls": i, "txt": f"caption {i}", "tar": inner()}
            )
    data = (tmp_path / "0.tar").read_bytes()
    run = plain_run(np.frombuffer(data, np.uint8), 0, len(data))
    with tarfile.open(tmp_path / "0.tar") as tar:
        expected = [(m.name.encode(), m.offset_data, m.size) for m in tar]
    assert list(zip(run.names.tolist(), run.offset.tolist(), run.size.tolist(), strict=True)) == expected
    assert data[run.until :].count(0) == len(data) - run.until
    found = scan(tmp_path / "0.tar", (b".txt",))
    assert len(found.rows.keys) == 50 and sorted(found.texts.values())[7] == b"caption 15"


def test_what_is_cut_is_not_plain():
    """The second file's data end at byte 2748; whether blocks that fill it up follow is another question."""
    data = np.frombuffer(archive([("a.jpg", b"1" * 700), ("b.jpg", b"2" * 700)], tarfile.GNU_FORMAT), np.uint8)
    for total, names in ((2748, [b"a.jpg", b"b.jpg"]), (2747, [b"a.jpg"]), (2048, [b"a.jpg"])):
        assert plain_run(data[:total], 0, total).names.tolist() == names


@pytest.mark.parametrize("times", [None, (0.5,)])
def test_every_cut_and_every_broken_header_is_noticed(tmp_path, times):
    files = [(f"{i}.{e}", bytes([65 + i]) * 700) for i in range(4) for e in ("jpg", "txt")]
    data = archive(files, tarfile.PAX_FORMAT, times)
    whole = scan_of(tmp_path, data)
    assert whole.problem == "" and whole.rows.keys == ("0", "1", "2", "3")
    end = walked = list(walk(data))[-1].offset + 1024
    for cut in range(0, end + 1024, 512 - 100):
        found = scan_of(tmp_path, data[:cut])
        assert found.problem and found.rows.keys == whole.rows.keys[: len(found.rows.keys)], cut
        assert len(found.rows.keys) < 4
    for entry in walk(data):
        for byte in (0, 99, 124, 135, 148, 156, 257, 345, 511):
            at = entry.offset - 512 + byte
            found = scan_of(tmp_path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert found.problem, (entry, byte)
    assert walked == end


def scan_of(folder, data):
    (folder / "x.tar").write_bytes(data)
    return scan(folder / "x.tar")


@pytest.mark.parametrize("size", [b"-0000001000", b"0000_000001", b"0000000009x", b"          x"])
def test_sizes_that_are_no_numbers(tmp_path, size):
    """A negative size would lead back to the same header for ever."""
    head = bytearray(archive([("a.jpg", b"1")], tarfile.PAX_FORMAT)[:512])
    head[124:135] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    assert "has no size" in scan_of(tmp_path, bytes(head) + bytes(2048)).problem
