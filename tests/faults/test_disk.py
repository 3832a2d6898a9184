"""A disk that is full while a checkpoint is written, and a shard that disappears."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.protocols import Clock
from pipeline.engine import saving
from pipeline.record.logs import log_path
from pipeline.run import train as training
from tests.faults.conftest import OWN
from tests.faults.launched import note_first_step, note_time, recovery, wait_until
from tests.integration.runs import codes, metrics, overrides, run, steps_of


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, a little larger than what the preflight wants to see free."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


def fill_up(disk: Path) -> None:
    """Take all that is free, to the last byte."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def full_at_second_save(disk: Path, folder: Path, who: str) -> None:
    """The disk is full when the second checkpoint is written: for all ranks, or after rank 0 has written its part."""
    saves, write = 0, saving.write_fragments
    rank = int(os.environ["RANK"])

    def write_on_full_disk(path: Path, parts: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 2:
            done = disk / "filled"
            if (who == "all ranks") == (rank == 0):  # this rank fills it, before its own part
                if who == "rank 1 alone":
                    wait_until(lambda: (disk / "written").exists(), "part of rank 0")
                done.touch()
                note_time(disk.parent, "fault")
                fill_up(disk)
            elif who == "all ranks":
                wait_until(done.exists, "full disk")
                time.sleep(0.5)
        specs = write(path, parts)
        if saves == 2 and rank == 0:
            (disk / "written").touch()
        return specs

    saving.write_fragments = write_on_full_disk


@pytest.mark.fault(7, "disk full while saving")
@pytest.mark.parametrize("who", ["all ranks", pytest.param("rank 1 alone", marks=pytest.mark.slow)])
def test_a_full_disk(who, small_disk, whole, glyphs, tmp_path, fault_row):
    folder = small_disk / "run"
    settings = overrides(folder, glyphs / "train", *OWN)
    ended = codes(run(2, "supervised", settings, hurt=partial(full_at_second_save, small_disk, folder, who)))
    assert 2 in ended, ended
    state = json.loads((folder / "state.json").read_text())
    assert (state["outcome"], state["exit_code"]) == ("failed", 2) and "No space left" in state["error"]
    assert "make room" in state["error"]
    assert steps_of(folder) == [3]

    (small_disk / "ballast").unlink()
    shutil.copy(tmp_path / "time-of-fault", folder / "time-of-fault")
    assert codes(run(2, "supervised", settings, hurt=note_first_step)) == [0, 0]
    assert metrics(folder) == metrics(whole)
    fault_row.case, fault_row.seconds = f"2 ranks, {who}", recovery(folder)
    fault_row.outcome = "exit 2, names the disk; with room made, same batches and losses from the checkpoint before"


def lose_shards_at(shards: Path, folder: Path, step: int) -> None:
    """Rank 0 moves all shards away after this step."""
    log = training.Job.log

    def then_lose(job: Any, clock: Clock) -> None:
        log(job, clock)
        if clock.step == step and job.place.first:
            note_time(folder, "fault")
            for shard in shards.glob("*.tar"):
                shard.rename(shard.with_suffix(".gone"))

    training.Job.log = then_lose  # type: ignore[method-assign]


@pytest.mark.fault(11, "a shard that disappears mid-run")
def test_a_lost_shard(glyphs, whole, tmp_path, fault_row):
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(glyphs / "train", shards)
    length = ["run.length=30ba", "data.read_mb=1"]
    undisturbed = overrides(tmp_path / "undisturbed", glyphs / "train", *OWN, *length)
    assert codes(run(2, "supervised", undisturbed)) == [0, 0]
    settings = overrides(folder, shards, *OWN, *length)
    folder.mkdir()
    ended = codes(run(2, "supervised", settings, hurt=partial(lose_shards_at, shards, folder, 4)))
    assert 2 in ended, ended
    state = json.loads((folder / "state.json").read_text())
    assert state["exit_code"] == 2 and ".tar" in state["error"], state
    assert "cannot open shard" in log_path(folder, state["rank"]).read_text()

    for shard in shards.glob("*.gone"):
        shard.rename(shard.with_suffix(".tar"))
    assert codes(run(2, "supervised", settings, hurt=note_first_step)) == [0, 0]
    assert metrics(folder) == metrics(tmp_path / "undisturbed")
    fault_row.case, fault_row.seconds = "2 ranks", recovery(folder)
    fault_row.outcome = "exit 2, names the shard; with the shard back, same batches and losses"
