"""Saving in the background: what is saved is the state of the step, and it is published by all ranks or by none."""

from __future__ import annotations

import json
import os
import shutil
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import CheckpointError
from pipeline.dist.group import Place
from pipeline.engine import saving
from pipeline.engine.checkpoint import CheckpointStore, read_manifest, verify_file
from pipeline.engine.fragments import Fragment, whole
from pipeline.engine.saving import FAILED, Saver, Series


def saver(folder: Path, keep: int = 3, rank: int = 0, world: int = 1) -> Saver:
    place = Place(rank, world, rank, torch.device("cpu"), timeout=None)  # type: ignore[arg-type]
    return Saver(CheckpointStore(folder / "checkpoints", place, print), keep, lambda step: None)


def value_of(folder: Path) -> float:
    """What the newest checkpoint holds."""
    saved = saver(folder).store.newest()
    assert saved is not None
    found = torch.zeros(5)
    saved.fill([whole("model/a", found)], 0)
    assert (found == found[0]).all()
    return found[0].item()


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this is set."""
    go = threading.Event()
    write = saving.write_fragments

    def wait_and_write(*args):
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(saving, "write_fragments", wait_and_write)
    return go


def test_training_goes_on_and_the_copy_does_not_change(tmp_path, lone_group, held):
    a, saves = torch.full((5,), 1.0), saver(tmp_path)
    saves.save(1, [whole("model/a", a)], {"step": 1})
    a.fill_(2.0)
    assert saves.progress == 0
    saves.told([0])
    assert saves.store.steps() == []  # nothing is published before all have written
    held.set()
    saves.finish()
    assert value_of(tmp_path) == 1.0
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_it_is_published_by_what_the_ranks_tell_each_other(tmp_path, lone_group):
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    for stage in (1, 2):
        assert saves._flight is not None
        saves._flight.task.join()
        assert saves.progress == stage
        saves.told([stage])
        saves.told([stage])  # an older message of a GPU, which is looked at late, changes nothing
    assert saves._flight is None and saves.store.steps() == [1]


def test_one_at_a_time_and_old_ones_go(tmp_path, lone_group):
    saves = saver(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
        assert saves.store.steps() == list(range(max(1, step - 2), step))  # the one before is there
    saves.finish()
    assert saves.store.steps() == [3, 4] and value_of(tmp_path) == 4.0


def test_the_same_state_gives_the_same_bytes(tmp_path, lone_group, held):
    held.set()
    shared = torch.ones(())
    parts = [Fragment("optimizer/step/a", 0, shared.view(1), ()), Fragment("optimizer/step/b", 0, shared.view(1), ())]
    parts.append(Fragment("model/a", 3, torch.randn(7), (4, 5)))
    for name in ("one", "two"):
        saves = saver(tmp_path / name)
        saves.save(1, parts, {"step": 1})
        saves.finish()
    one, two = (tmp_path / n / "checkpoints" / "step-00000001" / "rank-00000.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert load_file(one)["model/a@3"].equal(parts[2].data)
    saving.write_fragments(tmp_path / "plain", parts[2:])
    assert load_file(tmp_path / "plain")["model/a@3"].equal(parts[2].data)


@pytest.mark.parametrize(
    ("owner", "name", "newest"),
    [
        (saving, "write_fragments", 1.0),
        (saving, "replace_file", 1.0),
        (os, "rename", 1.0),
        (saving, "sync_folder", 2.0),
    ],
    ids=["parts", "manifest", "rename", "before latest"],
)
def test_what_fails_leaves_a_whole_one_and_says_how_full_the_disk_is(
    owner, name, newest, tmp_path, lone_group, monkeypatch
):
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    saves.finish()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    saves.save(2, [whole("model/a", torch.full((5,), 2.0))], {"step": 2})
    match = r"rank 0: .*No space left on device.*the disk at / has .* GB free.*Older checkpoints are untouched"
    with pytest.raises(CheckpointError, match=match):
        saves.finish()
    monkeypatch.undo()
    assert value_of(tmp_path) == newest
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"  # it comes last
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    saves.finish()  # nothing is in flight any more


def test_nothing_has_its_name_before_it_is_on_the_disk(tmp_path, lone_group, monkeypatch):
    """Else a machine that loses its power keeps a checkpoint by name and not by content."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def named(move):
        def note(source, target):
            move(source, target)
            done.append(("named", Path(target).name))

        return note

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    saves.finish()
    step = done.index(("named", "step-00000001"))
    assert ("synced", "rank-00000.safetensors") in done[:step]
    assert done.index(("named", "checkpoint.json")) < done.index(("synced", "step-00000001.tmp")) < step
    assert step < done.index(("synced", "checkpoints")) < done.index(("named", "latest"))


def test_what_is_there_is_told_and_only_that(tmp_path, lone_group, held):
    told: list[int] = []
    saves = saver(tmp_path)
    saves.saved = told.append
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    assert told == []
    held.set()
    saves.save(2, [whole("model/a", torch.ones(5))], {"step": 2})
    assert told == [1]
    saves.finish()
    assert told == [1, 2]


def test_a_folder_that_cannot_be_made_is_told_to_all(tmp_path, lone_group):
    (tmp_path / "checkpoints").touch()
    saves = saver(tmp_path)
    with pytest.raises(CheckpointError, match=r"could not write the checkpoint of step 1 .*Not a directory"):
        saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    saves.finish()  # nothing is in flight


def test_the_umask_of_the_user_holds(tmp_path, lone_group):
    """Those who share a project evaluate each other's checkpoints."""
    before = os.umask(0o007)
    try:
        saves = saver(tmp_path)
        saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
        saves.finish()
    finally:
        os.umask(before)
    made = list(saves.store.folder.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o660} and len(made) == 4
    assert saves.store.path(1).stat().st_mode & 0o777 == 0o770


def test_an_old_checkpoint_that_cannot_be_removed_is_no_reason_to_end(tmp_path, lone_group, monkeypatch):
    saves, remove = saver(tmp_path, keep=1), shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name == "step-00000001" and not ignore_errors:
            raise OSError(39, "Directory not empty")  # somebody reads it over NFS

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
    saves.finish()
    assert saves.store.steps() == [1, 2] and value_of(tmp_path) == 2.0
    monkeypatch.setattr(shutil, "rmtree", remove)
    saves.save(3, [whole("model/a", torch.full((5,), 3.0))], {"step": 3})
    saves.finish()
    assert saves.store.steps() == [3]


def test_what_a_crash_left_half_written_is_no_checkpoint_and_goes_with_the_next_save(tmp_path, lone_group):
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    saves.finish()
    shutil.copytree(saves.store.path(1), saves.store.folder / "step-00000002.tmp")
    shutil.copytree(saves.store.path(1), saves.store.folder / "step-00000003.tmp")
    assert value_of(tmp_path) == 1.0 and saves.store.steps() == [1]
    saves.save(2, [whole("model/a", torch.full((5,), 2.0))], {"step": 2})
    saves.finish()
    assert value_of(tmp_path) == 2.0 and not list(saves.store.folder.glob("*.tmp"))


def test_a_failure_is_told(tmp_path, lone_group, monkeypatch):
    monkeypatch.setattr(saving, "write_tensors", lambda *args: 1 / 0)
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    assert saves._flight is not None
    saves._flight.task.join()
    assert saves.progress == FAILED
    with pytest.raises(CheckpointError, match="division by zero"):
        saves.told([FAILED])


@pytest.mark.world_size(2)
def test_one_rank_that_fails_or_is_late_decides_for_all(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    saves = saver(tmp_path, rank=rank, world=2)
    part = Fragment("model/a", 5 * rank, torch.full((5,), float(rank)), (10,))
    go, write = threading.Event(), saving.write_fragments
    if rank == 1:
        saving.write_fragments = lambda *args: (go.wait(60), write(*args))[1]
    saves.save(1, [part], {"step": 1})

    def exchange() -> list[int]:
        if rank == 0 and saves._flight is not None:
            saves._flight.task.join()
        told = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(told, torch.tensor([saves.progress]))
        saves.told([int(t) for t in told])
        return [int(t) for t in told]

    assert exchange() == [1, 0]  # rank 0 has written, rank 1 has not
    assert saves.store.steps() == []
    go.set()
    saves.finish()
    assert saves.store.steps() == [1]
    files = json.loads((saves.store.path(1) / "checkpoint.json").read_text())["files"]
    assert sorted(files) == ["rank-00000.safetensors", "rank-00001.safetensors"]

    if rank == 1:
        saving.write_fragments = lambda *args: 1 / 0  # type: ignore[assignment]
    saves.save(2, [part], {"step": 2})
    with pytest.raises(CheckpointError, match="rank 1: division by zero"):
        saves.finish()
    dist.barrier()
    assert saves.store.steps() == [1] and not list(saves.store.folder.glob("*.tmp"))
    dist.destroy_process_group()


def saved_series(folder: Path, steps: range, *, optimizer: bool, every: Fraction = Fraction(3)) -> Saver:
    """A run that has saved at each step, a weight and an optimizer's state."""
    place = Place(0, 1, 0, torch.device("cpu"), timeout=None)  # type: ignore[arg-type]
    store = CheckpointStore(folder / "checkpoints", place, print)
    saves = Saver(store, 2, lambda step: None, Series(every, optimizer))
    for step in steps:
        parts = [
            whole("model/a", torch.full((5,), float(step))),
            whole("optimizer/m/a", torch.full((5,), -float(step))),
        ]
        saves.save(step, parts, {"step": step})
    saves.finish()
    return saves


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_series_stays_with_what_it_is_to_keep(tmp_path, lone_group, optimizer):
    saves = saved_series(tmp_path, range(1, 9), optimizer=optimizer)
    assert saves.store.steps() == [3, 6, 7, 8]
    for step in saves.store.steps():
        saved = read_manifest(saves.store.path(step))
        assert {p.name for p in saved.folder.iterdir()} == {*saved.files, "checkpoint.json"}
        for name, facts in saved.files.items():
            verify_file(saved.folder / name, facts)
        found = torch.zeros(5)
        saved.fill([whole("model/a", found)], 0)
        assert found.tolist() == [step] * 5
        kept = optimizer or step > 6
        assert ("optimizer/m/a" in saved.tensors) == kept == (not saved.state.get("thin"))
        if kept:
            saved.fill([whole("optimizer/m/a", found)], 0)
            assert found.tolist() == [-step] * 5
    size = sum(f.stat().st_size for f in saves.store.path(3).glob("*.safetensors"))
    whole_size = sum(f.stat().st_size for f in saves.store.path(8).glob("*.safetensors"))
    assert size == whole_size if optimizer else size < 0.7 * whole_size


def test_nothing_goes_on_from_a_checkpoint_without_an_optimizer(tmp_path, lone_group):
    saves = saved_series(tmp_path, range(1, 9), optimizer=False)
    for step in (7, 8):
        shutil.rmtree(saves.store.path(step))
    newest = saves.store.newest()
    assert newest is not None and newest.step == 6, "it can be evaluated"
    with pytest.raises(
        CheckpointError, match="step-00000006: it is kept for evaluation and holds no optimizer's state"
    ):
        saves.store.newest(to_go_on=True)


def test_killed_while_it_takes_the_optimizer_out_nothing_is_lost(tmp_path, lone_group, monkeypatch):
    saves = saved_series(tmp_path, range(3, 4), optimizer=False)
    folder = saves.store.path(3)
    before = sorted(p.name for p in folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(saving, "replace_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saving.thin(folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saving.thin(folder)
    assert sorted(p.name for p in folder.iterdir()) == before
    newest = saves.store.newest()
    assert newest is not None and newest.state["thin"], "whole already"
    saving.thin(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]
