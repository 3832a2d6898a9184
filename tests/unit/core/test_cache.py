"""Entries that are whole or not there, built by one process while others wait."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import cache
from pipeline.core.cache import VARIABLE, cache_folder, entry
from pipeline.core.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def is_whole(folder: Path) -> bool:
    return (folder / "x").is_file() and (folder / "x").read_text() == "whole"


def write(folder: Path) -> None:
    (folder / "x").write_text("whole")


def test_it_lies_where_the_variable_says_or_in_the_users_own(tmp_path, monkeypatch):
    assert cache_folder("data") == tmp_path / "data"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("data") == tmp_path / "home" / ".cache" / "sluice" / "data"
    monkeypatch.setenv(VARIABLE, "/dev/null/there")
    with pytest.raises(ConfigError, match=VARIABLE):
        cache_folder("data")


def test_an_entry_is_built_once(tmp_path):
    times: list[Path] = []

    def build(folder: Path) -> None:
        times.append(folder)
        write(folder)

    assert entry("data", "a", build, is_whole) == entry("data", "a", build, is_whole) == tmp_path / "data" / "a"
    assert len(times) == 1 and times[0] != tmp_path / "data" / "a"


def test_a_damaged_entry_is_built_anew(tmp_path):
    found = entry("data", "a", write, is_whole)
    (found / "x").write_text("who")
    assert is_whole(entry("data", "a", write, is_whole))


def test_one_that_failed_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "x").write_text("wh")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        entry("data", "a", fail, is_whole)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".a.lock"]


def test_a_full_disk_says_so():
    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=f"No space left.*{VARIABLE}"):
        entry("data", "a", fail, is_whole)


def test_without_locks_everybody_builds_and_the_first_stays(tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(cache.fcntl, "flock", none)

    def overtaken(folder: Path) -> None:
        other = tmp_path / "data" / "a"
        entry("data", "a", write, is_whole)
        (other / "first").touch()
        monkeypatch.setattr(cache.shutil, "rmtree", lambda *a, **k: None)  # as if it came between the two
        write(folder)

    assert (entry("data", "a", overtaken, is_whole) / "first").is_file()


def build_in_child(pipe: Any, go_on: Any) -> None:
    def build(folder: Path) -> None:
        pipe.send(os.getpid())
        os.read(go_on, 1)
        write(folder)

    entry("data", "a", build, is_whole, lambda folder: pipe.send("waiting"))
    pipe.send("done")


@pytest.mark.parametrize("dies", [False, True])
def test_others_wait_for_the_one_that_builds_and_replace_one_that_dies(dies, tmp_path):
    context = mp.get_context("fork")
    wait, go_on = os.pipe()
    pipes = [context.Pipe() for _ in range(2)]
    children = [context.Process(target=build_in_child, args=(there, wait)) for _, there in pipes]
    first, second = (here for here, _ in pipes)
    children[0].start()
    builder = first.recv()
    children[1].start()
    assert second.recv() == "waiting"
    if dies:
        os.kill(builder, signal.SIGKILL)
        assert second.recv() == children[1].pid
    os.write(go_on, b"..")
    assert second.recv() == "done"
    for child in children:
        child.join()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".a.lock", "a"]
    assert is_whole(tmp_path / "data" / "a")
