"""Reading takes the newest whole checkpoint: what is damaged is passed over by all ranks and named, whatever it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.engine.checkpoint import read_manifest
from pipeline.engine.fragments import Fragment, whole
from tests.unit.engine.test_saving import saver, value_of


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change(path: Path, **values: object) -> None:
    """As it was before a manifest had a hash of its own."""
    facts = json.loads(path.read_text())
    del facts["sha256"]
    path.write_text(json.dumps(facts | values))


DAMAGE = {
    "flipped": ("rank-00000.safetensors", flip),
    "truncated": ("rank-00000.safetensors", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "missing": ("rank-00000.safetensors", Path.unlink),
    "no manifest": ("checkpoint.json", Path.unlink),
    "an empty manifest": ("checkpoint.json", lambda path: path.write_text("")),
    "a manifest of zeros": ("checkpoint.json", lambda path: path.write_bytes(bytes(512))),
    "another manifest": ("checkpoint.json", lambda path: path.write_text("[]")),
    "half a manifest": ("checkpoint.json", lambda path: path.write_text('{"format": "sluice-checkpoint"}')),
    "no tensors": ("checkpoint.json", lambda path: change(path, tensors=[])),
    "a later version": ("checkpoint.json", lambda path: change(path, version=2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_passed_over_and_named_and_may_be_saved_again(damage, tmp_path, lone_group, capsys):
    saves = saver(tmp_path)
    for step in (1, 2):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
    saves.finish()
    name, hurt = DAMAGE[damage]
    hurt(saves.store.path(2) / name)
    assert value_of(tmp_path) == 1.0
    said = capsys.readouterr().out
    assert said.startswith(f"passed over checkpoint {saves.store.path(2)}: ") and name in said
    saves.save(2, [whole("model/a", torch.full((5,), 7.0))], {"step": 2})
    saves.finish()
    assert value_of(tmp_path) == 7.0 and saves.store.steps() == [1, 2]


def test_what_is_damaged_does_not_count_among_those_that_are_kept(tmp_path, lone_group):
    """Of 8, 10 and 12 the last two are damaged: going on from 8, none but the newest whole ones may replace it."""
    saves = saver(tmp_path)
    for step in (8, 10, 12):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
    saves.finish()
    for step in (10, 12):
        flip(saves.store.path(step) / "rank-00000.safetensors")
    again = saver(tmp_path, keep=1)
    found = again.store.newest()
    assert found is not None and found.step == 8
    for step in (9, 10, 11):
        again.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
        again.finish()
        assert value_of(tmp_path) == step
        assert again.store.steps() == ([9, 10, 12] if step == 9 else [step, 12])
    again.save(12, [whole("model/a", torch.full((5,), 12.0))], {"step": 12})
    again.finish()
    assert again.store.steps() == [12] and value_of(tmp_path) == 12.0


def test_a_checkpoint_may_have_any_name(tmp_path, lone_group):
    saves = saver(tmp_path)
    saves.save(3, [whole("model/a", torch.ones(5))], {"step": 3})
    saves.finish()
    saves.store.path(3).rename(tmp_path / "best")
    assert read_manifest(tmp_path / "best").step == 3


def test_no_byte_of_a_manifest_can_change_unnoticed(tmp_path, lone_group, capsys):
    """The step, the position in the data and the settings stand in it and nowhere else."""
    saves = saver(tmp_path)
    for step in (1, 2):
        saves.save(
            step, [whole("model/a", torch.full((5,), float(step)))], {"step": step, "lr": 0.1, "name": "gr\xf6\xdfer"}
        )
    saves.finish()
    path = saves.store.path(2) / "checkpoint.json"
    text = path.read_bytes()
    for at in range(len(text)):
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        found = saves.store.newest()
        assert found is not None
        if found.step != 1:  # the name of the hash itself, which the first manifests did not have
            assert text[text.rindex(b'"sha256"') : at + 1] in (b'"sha256"'[:n] for n in range(2, 8))
            assert found.state == {"step": 2, "lr": 0.1, "name": "gr\xf6\xdfer"}
    path.write_bytes(text)
    assert value_of(tmp_path) == 2.0


def test_a_manifest_without_a_hash_of_its_own_is_read(tmp_path, lone_group):
    saves = saver(tmp_path)
    saves.save(1, [whole("model/a", torch.ones(5))], {"step": 1})
    saves.finish()
    change(saves.store.path(1) / "checkpoint.json")
    assert value_of(tmp_path) == 1.0


@pytest.mark.parametrize("latest", [None, "", "step-99999999\n", "no step"])
def test_which_is_the_newest_does_not_depend_on_a_pointer(latest, tmp_path, lone_group):
    saves = saver(tmp_path)
    for step in (1, 2):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
    saves.finish()
    pointer = saves.store.folder / "latest"
    pointer.unlink()
    if latest is not None:
        pointer.write_text(latest)
    assert value_of(tmp_path) == 2.0


@pytest.mark.world_size(2)
def test_damage_that_one_rank_sees_is_seen_by_all(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    saves = saver(tmp_path, rank=rank, world=2)
    for step in (1, 2):
        saves.save(step, [Fragment("model/a", 5 * rank, torch.full((5,), float(step)), (10,))], {"step": step})
    saves.finish()
    dist.barrier()
    if rank == 0:
        flip(saves.store.path(2) / "rank-00001.safetensors")
    dist.barrier()
    found = saves.store.newest()
    assert found is not None and found.step == 1
    dist.destroy_process_group()
