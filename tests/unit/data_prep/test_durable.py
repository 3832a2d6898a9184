"""What is there after a loss of power or a broken upload: names hold whole files, and renames are on the disk."""

import os
from pathlib import Path

import fsspec
import pytest

from data_prep.build import build
from data_prep.options import Options
from data_prep.store import LocalStore, open_store
from tests.unit.data_prep.samples import ListSource, inline


@pytest.fixture
def order(monkeypatch):
    """In order: ("sync", file, bytes) and ("rename", file, bytes, folder), where files and folders are inodes."""
    events = []
    replace = os.replace

    def fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("sync", status.st_ino, status.st_size))

    def renamed(source, target):
        status = os.stat(source)
        events.append(("rename", status.st_ino, status.st_size, os.stat(Path(target).parent).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    return events


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_next(tmp_path, order):
    """A name without its content would be taken for a finished shard when the build goes on."""
    build(ListSource(inline(7)), tmp_path, Options({}, shard_samples=3))
    renames = [i for i, event in enumerate(order) if event[0] == "rename"]
    assert len(renames) >= 3 * 3 + 3, "three tars, indexes and notes; manifest, sizes and build.json"
    for begin, end in zip(renames, [*renames[1:], len(order)], strict=True):
        _, file, size, folder = order[begin]
        assert ("sync", file, size) in order[:begin]
        assert folder in [event[1] for event in order[begin + 1 : end]]


def test_a_file_that_can_be_renewed_is_whole_too(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.write("x.idx", b"old", renewable=True)
    write = Path.write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            store.write("x.idx", b"new content", renewable=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.idx": b"old"}


def test_half_an_upload_has_no_name(monkeypatch):
    store = open_store("memory://durable")
    files = fsspec.filesystem("memory")

    def broken(self, source, target, **options):
        self.pipe_file(target, Path(source).read_bytes()[:2])
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(type(files), "put_file", broken)
        with pytest.raises(OSError, match="connection lost"):
            store.write("x.tar", b"content")
    with pytest.raises(FileNotFoundError):
        store.read("x.tar")
    store.write("x.tar", b"content")
    assert store.names("") == ["x.tar"] and store.read("x.tar") == b"content"
    store.close()
