"""A folder of columns stays below its limit, and what is in use stays there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.suites.feature_cache import Entry, FeatureCache, Part, write_rows
from pipeline.suites.features import Form

FORM = Form(torch.float32, (16,))
ROWS = 64
FILE = 64 * ROWS + 256
"""Bytes of a file, header included."""


def begin(folder: Path, name: str, limit: int = 3 * FILE) -> Part | None:
    return FeatureCache(folder, limit).begin(Entry(name), FORM, ROWS)


def rows(name: str) -> Tensor:
    return torch.full((ROWS, FORM.bytes), ord(name), dtype=torch.uint8)


def keep(folder: Path, name: str, limit: int = 3 * FILE) -> Tensor | None:
    part = begin(folder, name, limit)
    if part is None:
        return None
    write_rows(part.kept, torch.arange(ROWS), rows(name))
    return FeatureCache(folder, limit).seal(part)[1]


def found(folder: Path, name: str) -> Tensor | None:
    column = FeatureCache(folder, FILE).find(Entry(name), ROWS)
    return None if column is None else column[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, used in the order of their names."""
    for number, name in enumerate("abc"):
        keep(tmp_path, name)
        os.utime(tmp_path / f"{Entry(name).mark}.safetensors", (number, number))
    return tmp_path


def names(folder: Path) -> str:
    return "".join(name for name in "abcdefg" if (folder / f"{Entry(name).mark}.safetensors").exists())


def test_what_was_not_used_for_longest_goes(folder):
    assert torch.equal(found(folder, "a"), rows("a"))  # and has been used by that
    keep(folder, "d")
    assert names(folder) == "acd"
    keep(folder, "e")
    assert names(folder) == "ade"


def test_what_is_in_use_stays(folder):
    used = found(folder, "a")
    os.utime(folder / f"{Entry('a').mark}.safetensors", (0, 0))
    keep(folder, "d")
    assert names(folder) == "acd" and torch.equal(used, rows("a"))
    del used
    keep(folder, "e")
    assert names(folder) == "cde"


def test_where_all_is_in_use_nothing_is_added(folder, capsys):
    used = [found(folder, name) for name in "abc"]
    assert keep(folder, "d") is None and names(folder) == "abc" and len(used) == 3
    assert "would not fit below cache_gb" in capsys.readouterr().err


def test_more_than_the_limit_is_not_kept_and_removes_nothing(folder, capsys):
    assert FeatureCache(folder, 3 * FILE).begin(Entry("d"), FORM, 4 * ROWS) is None
    assert names(folder) == "abc" and "would not fit" in capsys.readouterr().err


def test_what_is_being_written_counts_and_what_the_dead_left_goes(folder):
    part = begin(folder, "d")
    assert part is not None and names(folder) == "bc"
    keep(folder, "e")
    assert names(folder) == "ce" and part.kept.path.exists()
    os.close(part.file)  # as the system does when a process dies
    keep(folder, "f")
    assert names(folder) == "cef" and not part.kept.path.exists()


def test_what_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert keep(tmp_path, "a") is None
    assert f"features are not kept in {tmp_path}: No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [".lock"]


def test_rows_are_found_whole_by_number(tmp_path):
    """Written in pieces, out of order."""
    part = begin(tmp_path, "a")
    content = torch.arange(ROWS * 16, dtype=torch.float32).view(ROWS, 16)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    for ids in order.split(10):
        write_rows(part.kept, ids, content[ids].view(torch.uint8))
    assert torch.equal(FORM.rows(FeatureCache(tmp_path, FILE).seal(part)[1]), content)
    assert torch.equal(FORM.rows(found(tmp_path, "a")), content)
