"""Features are found again where all that decides them is the same, and nowhere else."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import pipeline.suites.feature_cache as feature_cache
import pipeline.suites.feature_store as feature_store
from pipeline.core.errors import DataError
from pipeline.dist.group import process_group
from pipeline.suites.feature_cache import FeatureCache
from pipeline.suites.feature_store import FeatureStore
from tests.contracts.components import ListStream
from tests.ranks import Ended, start_ranks
from tests.unit.suites.kept import CALLS, GB, SAMPLES, Encoder, Never, Twin, get, images, in_a_process, source, store

EXPECTED = images().flatten(1).float() @ Encoder().weight.detach()


@pytest.fixture(autouse=True)
def uncounted():
    CALLS.clear()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def of_features(folder: Path) -> Path:
    """The file that is no label."""
    (found,) = [path for path in files(folder) if load_file(path)["rows"].ndim == 2]
    return found


def test_what_was_extracted_is_read_by_the_next_process(lone_group, tmp_path):
    first = get(store(tmp_path), Encoder(), source())
    assert torch.allclose(first.x, EXPECTED, rtol=1e-6) and sum(CALLS) == SAMPLES
    second = get(store(tmp_path), Encoder(), source("other name"))
    assert torch.equal(second.x, first.x) and torch.equal(second.label, torch.arange(SAMPLES) % 3)
    assert sum(CALLS) == SAMPLES
    assert torch.equal(load_file(of_features(tmp_path))["rows"], first.x)  # any other reader's file, too
    assert len(files(tmp_path)) == len(os.listdir(tmp_path)) - 1  # and ".lock"


def test_evaluations_may_write_into_what_they_are_given(lone_group, tmp_path):
    get(store(tmp_path), Encoder(), source()).x.zero_()
    assert torch.allclose(get(store(tmp_path), Encoder(), source()).x, EXPECTED, rtol=1e-6)


def trained() -> Encoder:
    encoder = Encoder()
    encoder.weight.data[3, 2] += 1e-6
    return encoder


def hooked() -> Encoder:
    encoder = Encoder()
    encoder.register_forward_hook(lambda module, x, y: y + 1)
    return encoder


CHANGES = {
    "a weight": lambda: (trained(), source(), "fp32"),
    "a setting that is no weight": lambda: (Encoder(scale=1.5), source(), "fp32"),
    "another class": lambda: (Twin(), source(), "fp32"),
    "around it": lambda: (nn.Sequential(Encoder(), nn.ReLU()), source(), "fp32"),
    "training mode": lambda: (Encoder().eval(), source(), "fp32"),
    "a hook": lambda: (hooked(), source(), "fp32"),
    "data": lambda: (Encoder(), source(manifest="n"), "fp32"),
    "a part of the data": lambda: (Encoder(), source(keep="k"), "fp32"),
    "geometry": lambda: (Encoder(), source(image={"size": 3}), "fp32"),
    "precision": lambda: (Encoder(), source(), "bf16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_features_decides_what_is_found(change, lone_group, tmp_path):
    get(store(tmp_path), Encoder(), source())
    encoder, of, precision = CHANGES[change]()
    found = get(FeatureStore(precision, FeatureCache(tmp_path, GB)), encoder, of)
    assert sum(CALLS) == 2 * SAMPLES
    CALLS.clear()
    assert torch.equal(get(FeatureStore(precision, FeatureCache(tmp_path, GB)), encoder, of).x, found.x) and not CALLS


def test_other_code_is_another_key(lone_group, tmp_path, monkeypatch):
    get(store(tmp_path), Encoder(), source())
    monkeypatch.setattr(feature_store, "code_mark", lambda: "changed")
    get(store(tmp_path), Encoder(), source())
    assert sum(CALLS) == 2 * SAMPLES


def test_settings_of_captions_are_no_part_of_images(lone_group, tmp_path):
    get(store(tmp_path), Encoder(), source())
    get(store(tmp_path), Encoder(), source(captions={"max": 7}, tokenizer="t", fields=["image", "label", "text"]))
    assert sum(CALLS) == SAMPLES


@pytest.mark.parametrize("on_disk", [True, False])
def test_other_fields_are_read_without_the_encoder(on_disk, lone_group, tmp_path):
    """And labels are taken along, since they cost nothing."""
    kept = store(tmp_path) if on_disk else FeatureStore()
    get(kept, Encoder(), source(), fields=())
    assert torch.equal(get(kept, Encoder(), source(stream=Never)).label, torch.arange(SAMPLES) % 3)
    digest = get(kept, Encoder(), source(), fields=("image_digest",)).fields["image_digest"]
    assert digest.shape == (SAMPLES, 2) and sum(CALLS) == SAMPLES


def test_a_stream_of_which_little_is_known_is_not_kept(lone_group, tmp_path):
    of = dataclasses.replace(source(), facts=None)
    assert torch.allclose(get(store(tmp_path), Encoder(), of).x, EXPECTED, rtol=1e-6)
    assert not os.listdir(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(where: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[where] ^= 0x10
        path.write_bytes(content)

    return flip


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def of_another(path: Path) -> None:
    """Whole, of the same size, and of something else."""
    get(store(path.parent), trained(), source())
    (other,) = [p for p in files(path.parent) if p != path and p.stat().st_size == path.stat().st_size]
    shutil.copy(other, path)


def begun(path: Path) -> None:
    """As it is before its header: what a crash might leave on a disk that does not keep the order of writes."""
    content = path.read_bytes()
    path.write_bytes(bytes(64) + content[64:])


DAMAGE = {
    "cut": cut, "emptied": emptied, "longer": longer, "of another": of_another, "without a header": begun,
    "first row": flipped(-SAMPLES * 24), "last byte": flipped(-1), "header": flipped(40), "its length": flipped(0),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_foreign_is_made_anew_and_replaced(damage, lone_group, tmp_path, capsys):
    get(store(tmp_path), Encoder(), source())
    path = of_features(tmp_path)
    DAMAGE[damage](path)
    CALLS.clear()
    assert torch.allclose(get(store(tmp_path), Encoder(), source()).x, EXPECTED, rtol=1e-6) and sum(CALLS) == SAMPLES
    assert f"{path} are not used, but made anew" in capsys.readouterr().err
    assert torch.allclose(get(store(tmp_path), Encoder(), source()).x, EXPECTED, rtol=1e-6) and sum(CALLS) == SAMPLES
    assert not capsys.readouterr().err


def test_what_fails_leaves_nothing(lone_group, tmp_path):
    class Broken(ListStream):
        def __iter__(self):
            yield from list(super().__iter__())[:2]
            raise DataError("a shard is damaged")

    kept = store(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        get(kept, Encoder(), source(stream=Broken))
    assert os.listdir(tmp_path) == [".lock"]
    assert torch.allclose(get(kept, Encoder(), source()).x, EXPECTED, rtol=1e-6)


def test_a_folder_that_takes_nothing_costs_a_word(lone_group, tmp_path, capsys):
    kept = FeatureStore(cache=FeatureCache(tmp_path / "gone", GB))
    assert torch.allclose(get(kept, Encoder(), source()).x, EXPECTED, rtol=1e-6)
    assert capsys.readouterr().err.count("features are not kept in") == 1


def write_on_ranks(folder: Path, see: bool) -> None:
    with process_group(timeout_minutes=1):
        if not see and dist.get_rank() != 0:  # as on another node with a folder of its own
            feature_store._sees = lambda part: False
            feature_store.opened = lambda kept: None
        world = dist.get_world_size()
        found = get(store(folder), Encoder(), source())
        again = get(store(folder), Encoder(), source(stream=Never))
        assert torch.equal(found.x, again.x) and torch.equal(found.label, torch.arange(SAMPLES) % 3)
        assert torch.allclose(found.x, EXPECTED, rtol=1e-6)
        own = sum(CALLS)
        assert own < SAMPLES or world == 1


@pytest.mark.world_size(2)
@pytest.mark.parametrize("see", [True, False])
def test_two_ranks_write_one_file(see, tmp_path):
    write_on_ranks(tmp_path, see)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("see", [True, False])
def test_four_ranks_write_one_file(see, tmp_path):
    write_on_ranks(tmp_path, see)


def processes(folder: Path, dies: int = -1) -> list[Ended]:
    """Two that want the same: the second begins when the first is on its way."""

    def one(number: int, dies: int) -> Ended:
        return start_ranks(1, in_a_process, folder=folder / "kept", log=folder / str(number), dies=dies)[0]

    (folder / "kept").mkdir()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one, 0, dies)
        while not (folder / "0").exists() and not first.done():
            time.sleep(0.01)
        second = pool.submit(one, 1, -1)
        return [first.result(), second.result()]


def test_of_two_processes_one_waits(tmp_path):
    first, second = processes(tmp_path)
    assert first.problem is None and second.problem is None
    assert np.array_equal(first.value, second.value) and np.allclose(first.value, EXPECTED, rtol=1e-6)
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_who_waits_for_a_process_that_is_killed_goes_on(tmp_path):
    """And what that one has left behind is removed when room is made."""
    first, second = processes(tmp_path, dies=3)
    assert first.exit_code == -signal.SIGKILL
    assert second.problem is None and np.allclose(second.value, EXPECTED, rtol=1e-6)
    assert len((tmp_path / "0").read_text().splitlines()) == 4
    assert len((tmp_path / "1").read_text().splitlines()) == 5
    left = [p.name for p in (tmp_path / "kept").iterdir()]
    assert len([n for n in left if n.endswith(".safetensors")]) == 2 and not [n for n in left if n.endswith(".part")]


def test_who_waits_too_long_does_it_himself(lone_group, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "PATIENCE", 0.05)
    get(store(tmp_path), Encoder(), source())
    path = of_features(tmp_path)
    path.unlink()
    with open(tmp_path / f".{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert torch.allclose(get(store(tmp_path), Encoder(), source()).x, EXPECTED, rtol=1e-6)
    assert "waiting" in capsys.readouterr().err and path.exists()


class Single(ListStream):
    """Batches of one, so that what a batch takes for a moment is little beside the whole."""

    def __init__(self, image: torch.Tensor, label: torch.Tensor, rank: int, world: int) -> None:
        super().__init__(image, label, rank, world, batch=1)


def test_features_are_not_held_twice(lone_group, tmp_path):
    """24 MB of features: what this process holds beside the file stays far below that, also of ones that are found."""
    CALLS.clear()
    wide = Encoder(dim=SAMPLES * 50_000 // 4)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    before = anonymous()
    first = get(store(tmp_path), wide, source(stream=Single))
    size = first.x.numel() * 4
    assert size > 24e6
    assert anonymous() - before < 0.7 * size
    assert torch.equal(get(store(tmp_path), wide, source(stream=Never)).x, first.x)
    assert anonymous() - before < 0.7 * size
