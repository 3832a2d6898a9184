"""What is written is whole, and what stands in its way is named."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from pipeline.core import files
from pipeline.core.files import replace_file, room, stamp


@pytest.mark.parametrize(("left", "said"), [(0, True), (5, False)])
def test_a_disk_without_inodes_is_not_called_full_of_bytes(left, said, tmp_path, monkeypatch):
    facts = SimpleNamespace(f_bavail=3 * 10**6, f_frsize=1000, f_blocks=8 * 10**6, f_files=65536, f_favail=left)
    monkeypatch.setattr(files.os, "statvfs", lambda folder: facts)
    text = room(tmp_path)
    assert text.startswith("the disk at / has 3.000 GB free of 8.000 GB")
    assert ("all its 65,536 inodes are in use" in text) == said


def test_a_file_system_that_counts_no_inodes_does_not_lack_them(tmp_path, monkeypatch):
    facts = SimpleNamespace(f_bavail=1, f_frsize=1, f_blocks=1, f_files=0, f_favail=0)
    monkeypatch.setattr(files.os, "statvfs", lambda folder: facts)
    assert "inodes" not in room(tmp_path)


def test_a_stamp_changes_with_the_file(tmp_path):
    path = tmp_path / "x"
    assert stamp(path) is None
    replace_file(path, b"1")
    first = stamp(path)
    assert first == stamp(path)
    replace_file(path, b"1")
    assert stamp(path) != first
    first = stamp(path)
    os.utime(path, ns=(1, 2))
    assert stamp(path) != first
