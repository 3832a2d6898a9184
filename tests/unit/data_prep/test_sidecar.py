"""Data sets that several processes write: whole shards, the same bytes whoever wrote them, and nothing twice."""

from __future__ import annotations

from contextlib import closing

import pytest

from data_prep.sidecar import SidecarWriter
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load, load_index

MADE = {"embedded": {"teacher": "big", "augmentations": 2}}
SHARDS = {0: ["a", "b/c"], 1: [], 2: ["d"]}


def members(key):
    return [("out.npy", key.encode() * 3), ("top.npy", b"t")]


def write(out, numbers, made=MADE):
    with closing(SidecarWriter(str(out), made, 3)) as writer:
        for number in numbers:
            writer.write(number, SHARDS[number], [members(key) for key in SHARDS[number]])


def begin(out, made=MADE):
    with closing(SidecarWriter(str(out), made, 3)) as writer:
        return writer.begin(), writer.left()


def finish(out):
    with closing(SidecarWriter(str(out), MADE, 3)) as writer:
        return writer.finish()


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_several_write_what_one_would(tmp_path):
    for name, parts in (("one", [[0, 1, 2]]), ("two", [[2], [0, 1]])):
        assert begin(tmp_path / name) == (False, [0, 1, 2])
        for part in parts:
            write(tmp_path / name, part)
        assert finish(tmp_path / name).samples == 3
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == []
    manifest = load(tmp_path / "one")
    assert manifest.made == MADE and [shard.name for shard in manifest.shards] == ["000000.tar", "000002.tar"]
    assert load_index(manifest, manifest.shards[0]).keys == ("a", "b/c")
    assert list(manifest.fields) == ["out.npy", "top.npy"]
    assert verify(str(tmp_path / "one"), 0.0, lambda done: None).problems == {}


def test_what_is_finished_is_not_done_again(tmp_path):
    begin(tmp_path)
    write(tmp_path, [1, 2])
    assert begin(tmp_path) == (False, [0])
    (tmp_path / ".000000.tar.part").write_bytes(b"torn")
    write(tmp_path, [0])
    finish(tmp_path)
    assert begin(tmp_path)[0] is True


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    begin(tmp_path)
    other = {"embedded": {"teacher": "small", "augmentations": 2}}
    for _ in range(2):  # begun, and complete
        with pytest.raises(ConfigError, match=r"was made otherwise \(embedded.teacher: 'big' there, 'small' now\)"):
            begin(tmp_path, other)
        write(tmp_path, [0, 1, 2])
        finish(tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "x.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds files of another origin, x\.tar"):
        begin(tmp_path / "strange")


def test_a_key_that_no_tar_can_hold_is_named(tmp_path):
    begin(tmp_path)
    with (
        closing(SidecarWriter(str(tmp_path), MADE, 3)) as writer,
        pytest.raises(DataError, match=r"the key .kkk.* is too long"),
    ):
        writer.write(0, ["k" * 93], [members("k")])
