"""What each node finds out about itself reaches the judgement: of three nodes, the one with a fault is named to all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import LaunchError
from pipeline.dist.group import Place
from pipeline.run import preflight as module
from pipeline.run.preflight import preflight
from tests.unit.run.test_preflight import _joined, _place

CPU = torch.device("cpu")


def other_versions() -> None:
    module.provenance.versions = lambda: {"torch": "1.0"}


def slow_clock() -> None:
    now = time.time
    time.time = lambda: now() - 3600.0


def full_disk() -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    os.fsync = fail


def wrong_once() -> None:
    """Only the first of the sums, after the one that makes connections."""
    reduce, calls = dist.all_reduce, []

    def lossy(tensor: torch.Tensor) -> None:
        reduce(tensor)
        calls.append(tensor)
        tensor[-1] += float(len(calls) == 2)

    dist.all_reduce = lossy


def damaged_product() -> None:
    ones = torch.ones

    def damaged(*size: int, **more: torch.device) -> torch.Tensor:
        found = ones(*size, **more)
        found[300, 17] = 2.0
        return found

    torch.ones = damaged


@pytest.mark.world_size(3)
@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (other_versions, "runs torch 1.0 where others do not"),
        (slow_clock, "has a clock that is -3600 s off"),
        (full_disk, "cannot write the run folder"),
        (wrong_once, "adds up wrongly over the network"),
        (damaged_product, "computes wrongly on rank 1"),
    ],
)
def test_the_node_with_a_fault_is_named_to_all(hurt: Callable[[], None], words: str, tmp_path: Path):
    _joined()
    rank = dist.get_rank()
    module.node_name = lambda: f"n{rank}"
    if rank == 1:
        hurt()
    with pytest.raises(LaunchError) as caught:
        preflight(tmp_path, _place())
    assert str(caught.value) == f"preflight: node n1 {words}"
    assert json.loads((tmp_path / module.BAD_NODES).read_text()) == {"n1": words}


@pytest.mark.world_size(3)
def test_a_node_that_has_another_folder_in_the_place_of_the_runs_is_named(tmp_path: Path):
    _joined()
    rank = dist.get_rank()
    module.node_name = lambda: f"n{rank}"
    own = tmp_path / ("elsewhere" if rank == 1 else "run")
    own.mkdir(exist_ok=True)
    with pytest.raises(LaunchError, match="node n1 does not see the run folder"):
        preflight(own, _place())
    assert [*json.loads((tmp_path / "run" / module.BAD_NODES).read_text())] == ["n1"]


def test_a_node_that_is_sound_is_told_on_the_console(tmp_path, lone_group, capsys):
    preflight(tmp_path, Place(0, 1, 0, CPU, timedelta(minutes=1)))
    assert capsys.readouterr().out.startswith("preflight: 1 node, 1 x cpu; run folder written at ")


def test_the_memory_of_a_device_is_what_is_free_and_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 10**9, 140 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 at {device.index}")
    monkeypatch.setattr(module, "_computes", lambda device: True)
    found = module._look(tmp_path, Place(5, 8, 1, torch.device("cuda", 1), timedelta(minutes=1)))
    assert (found.device, found.device_free_gb, found.device_gb) == ("H200 at 1", 12.0, 140.0)
    assert found.free_bytes is None, "another rank of the node has looked at the disk"
