"""Whatever happens to a checkpoint, a run resumes from the newest whole one and says which it passed over."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import checkpoint, saving
from tests.faults.conftest import OWN
from tests.faults.launched import die as kill_me
from tests.faults.launched import note_first_step, note_time, recovery
from tests.integration.runs import codes, metrics, notes, overrides, run, steps_of

POINTS = ("before anything", "half a file", "before the manifest", "before the rename", "before latest")
NEWEST = "step-00000006"


def die_in_save(folder: Path, point: str) -> None:
    """Kill rank 0 or 1 at this point of the second checkpoint."""
    saves = 0
    write_fragments, replace_file, rename = saving.write_fragments, saving.replace_file, os.rename
    rank = int(os.environ["RANK"])

    def die(now: bool) -> None:
        if now and saves == 2:
            kill_me(folder)

    def fragments(path: Path, parts: Any) -> Any:
        nonlocal saves
        saves += 1
        die(point == "before anything" and rank == 1)
        specs = write_fragments(path, parts)
        if point == "half a file" and rank == 1 and saves == 2:
            os.truncate(path, path.stat().st_size // 2)
            die(True)
        return specs

    def small(path: Path, content: bytes) -> None:
        die(point == "before the manifest" and path.name == checkpoint.MANIFEST)
        die(point == "before latest" and path.name == checkpoint.LATEST)
        replace_file(path, content)

    def move(a: Any, b: Any) -> None:
        die(point == "before the rename" and "checkpoints" in str(b))
        rename(a, b)

    saving.write_fragments, saving.replace_file, os.rename = fragments, small, move


@pytest.mark.fault(2, "SIGKILL during a checkpoint")
@pytest.mark.parametrize("point", POINTS)
def test_killed_while_a_checkpoint_is_written(point, whole, glyphs, tmp_path, fault_row):
    folder = tmp_path / "run"
    settings = overrides(folder, glyphs / "train", *OWN)
    assert -9 in codes(run(2, "supervised", settings, hurt=partial(die_in_save, folder, point)))
    assert steps_of(folder) == ([3, 6] if point == "before latest" else [3])
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000003\n"

    assert codes(run(2, "supervised", settings, hurt=note_first_step)) == [0, 0]
    resumed = 6 if point == "before latest" else 3
    assert f"at step {resumed}" in notes(folder)
    fault_row.case, fault_row.seconds = f"2 ranks, {point}", recovery(folder)
    fault_row.outcome = f"same batches and losses from step {resumed} on"
    assert metrics(folder) == metrics(whole)
    assert steps_of(folder) == [3, 6, 9, 12]
    assert not list((folder / "checkpoints").glob("*.tmp"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a truncated file": lambda at: os.truncate(at / NEWEST / "rank-00001.safetensors", 100),
    "a flipped byte": lambda at: flip(at / NEWEST / "rank-00000.safetensors"),
    "a missing file": lambda at: (at / NEWEST / "rank-00001.safetensors").unlink(),
    "an empty manifest": lambda at: (at / NEWEST / "checkpoint.json").write_text(""),
    "a missing manifest": lambda at: (at / NEWEST / "checkpoint.json").unlink(),
}


def up_to_the_second(whole: Path, folder: Path) -> Path:
    """A copy of a run as it was after its second checkpoint."""
    shutil.copytree(whole, folder)
    for later in ("step-00000009", "step-00000012"):
        shutil.rmtree(folder / "checkpoints" / later)
    (folder / "checkpoints" / "latest").write_text(NEWEST + "\n")
    return folder


@pytest.mark.fault(8, "newest checkpoint damaged")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(damage, whole, glyphs, tmp_path, fault_row):
    fault_row.case = f"2 ranks, {damage}"
    folder = up_to_the_second(whole, tmp_path / "run")
    DAMAGE[damage](folder / "checkpoints")
    note_time(folder, "fault")
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN), hurt=note_first_step)) == [0, 0]
    said = notes(folder)
    assert f"passed over checkpoint {folder}/checkpoints/{NEWEST}" in said
    assert "resumed from" in said and "at step 3" in said
    assert metrics(folder) == metrics(whole)
    fault_row.outcome = "passed over and named; same batches and losses from the one before"
    fault_row.seconds = recovery(folder)


@pytest.mark.fault(8, "`latest` missing, empty or garbage")
@pytest.mark.parametrize("latest", [None, "", "step-99999999\n"], ids=["missing", "empty", "garbage"])
def test_latest_that_is_missing_or_wrong_changes_nothing(latest, whole, glyphs, tmp_path, fault_row):
    fault_row.case = "2 ranks, " + ("missing" if latest is None else "garbage" if latest else "empty")
    folder = up_to_the_second(whole, tmp_path / "run")
    pointer = folder / "checkpoints" / "latest"
    pointer.unlink()
    if latest is not None:
        pointer.write_text(latest)
    note_time(folder, "fault")
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN), hurt=note_first_step)) == [0, 0]
    assert f"resumed from {folder}/checkpoints/{NEWEST} at step 6" in notes(folder)
    assert metrics(folder) == metrics(whole)
    assert pointer.read_text() == "step-00000012\n"
    fault_row.outcome = "resumes from the newest whole checkpoint; same batches and losses"
    fault_row.seconds = recovery(folder)


@pytest.mark.fault(8, "every checkpoint damaged")
def test_it_never_starts_anew_while_there_are_checkpoints(whole, glyphs, tmp_path, fault_row):
    folder = up_to_the_second(whole, tmp_path / "run")
    for one in (folder / "checkpoints").glob("step-*"):
        flip(one / "rank-00000.safetensors")
    before = (folder / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN))) == [2, 2]
    assert (folder / "metrics.jsonl").read_bytes() == before
    fault_row.seconds, fault_row.until = time.monotonic() - began, "stopped"
    fault_row.case, fault_row.outcome = "2 ranks", "exit 2; does not start from step 0"


def test_another_model_or_another_order_is_refused(whole, glyphs, tmp_path):
    folder = up_to_the_second(whole, tmp_path / "run")
    base = overrides(folder, glyphs / "train", *OWN)
    assert codes(run(1, "supervised", [*base, "objective.encoder_args.depth=3"])) == [2]
    assert codes(run(1, "supervised", [*base, "run.seed=5"])) == [2]
    assert codes(run(1, "supervised", [*base, "run.global_batch=4"])) == [2]
    assert codes(run(1, "supervised", base)) == [0]
