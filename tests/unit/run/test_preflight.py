"""The preflight: what is wrong with a node is found, and laid at the door of that node alone."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import LaunchError
from pipeline.dist.group import Place
from pipeline.run import preflight as module
from pipeline.run.preflight import Report, judge, preflight

MB = 1 << 20


def reports() -> list[Report]:
    """Of three sound nodes with two ranks each."""
    return [
        Report(
            node=f"n{rank // 2}",
            rank=rank,
            device="H200",
            device_gb=140.0,
            device_free_gb=139.0,
            free_bytes=1000 * MB if rank % 2 == 0 else None,
            write_mb_per_second=500.0 if rank % 2 == 0 else None,
            clock=1e9 + rank * 0.01,
            versions="sluice 1, torch 2.9",
        )
        for rank in range(6)
    ]


def test_sound_nodes():
    assert judge(reports(), 100 * MB) == {}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"device": "cpu"}, "has cpu where others have H200"),
        ({"device_free_gb": 12.0}, "has only 12.0 of 140.0 GB free"),
        ({"sees_folder": False}, "does not see the run folder"),
        ({"free_bytes": 99 * MB}, "has 99 MB left for the run folder, which needs 100 MB"),
        ({"free_bytes": 1000 * MB, "write_mb_per_second": None}, "cannot write the run folder"),
        ({"clock": 1e9 + 60}, "has a clock that is +60 s off"),
        ({"clock": 1e9 - 60}, "has a clock that is -60 s off"),
        ({"versions": "sluice 1, torch 2.8"}, "runs torch 2.8 where others do not"),
        ({"sums_right": False}, "adds up wrongly"),
        ({"computes_right": False}, "computes wrongly on rank 3"),
    ],
)
def test_the_node_of_a_rank_with_a_fault_is_named(fault, words):
    found = reports()
    found[3] = replace(found[3], **fault)
    bad = judge(found, 100 * MB)
    assert list(bad) == ["n1"] and words in bad["n1"]


def test_the_figures_are_told_with_the_slowest_node():
    found = [replace(r, reduce_gb_per_second=2.5 - r.rank / 5) for r in reports()]
    found[2] = replace(found[2], write_mb_per_second=12.0)
    assert module.summary(found) == (
        "3 nodes, 6 x H200; run folder written at 12 MB/s by n1, the slowest, 1.05 GB free; "
        "sums over all ranks at 1.5 GB/s; clocks within 0.05 s"
    )
    assert "nodes" not in module.summary(found[:1]) and "clocks" not in module.summary(found[:1])


def test_the_sum_over_many_ranks_is_exact():
    numbers = torch.arange(64).float()
    total = torch.zeros(64)
    for rank in range(16_384):
        total += numbers * module.weight(rank)
    assert torch.equal(total.double(), torch.arange(64).double() * 16_384 * 4.5)


def _place() -> Place:
    return Place(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), timedelta(seconds=60))


def _joined() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


@pytest.mark.world_size(2)
def test_two_sound_nodes_leave_figures_and_nothing_else(tmp_path: Path):
    _joined()
    module.node_name = lambda: f"n{dist.get_rank()}"
    preflight(tmp_path, _place())
    dist.barrier()
    facts = json.loads((tmp_path / module.FILE).read_text())
    assert facts["bad"] == {} and [r["node"] for r in facts["ranks"]] == ["n0", "n1"]
    for rank in facts["ranks"]:
        assert rank["reduce_gb_per_second"] > 0 and rank["write_mb_per_second"] > 0
        assert rank["memory_gb"] > 0 and rank["free_bytes"] > 0
    assert [p.name for p in tmp_path.iterdir()] == [module.FILE]


@pytest.mark.world_size(2)
def test_a_bad_node_stops_all_ranks_and_is_remembered(tmp_path: Path):
    _joined()
    rank = dist.get_rank()
    module.node_name = lambda: f"n{rank}"
    module._computes = lambda device: rank != 1  # type: ignore[assignment]
    with pytest.raises(LaunchError, match="node n1 computes wrongly on rank 1") as caught:
        preflight(tmp_path, _place())
    assert caught.value.everywhere
    assert json.loads((tmp_path / module.BAD_NODES).read_text()) == {"n1": "computes wrongly on rank 1"}


@pytest.mark.world_size(2)
def test_what_is_wrong_everywhere_is_no_nodes_fault(tmp_path: Path):
    _joined()
    module.node_name = lambda: f"n{dist.get_rank()}"
    module.SPARE_BYTES = 1 << 62
    with pytest.raises(LaunchError, match="left for the run folder"):
        preflight(tmp_path, _place())
    assert not (tmp_path / module.BAD_NODES).exists()


@pytest.mark.world_size(2)
def test_a_sum_that_is_wrong_is_noticed(tmp_path: Path):
    _joined()
    whole = dist.all_reduce

    def lossy(tensor, *args, **kwargs):
        whole(tensor, *args, **kwargs)
        tensor[-1] += float(dist.get_rank())

    dist.all_reduce = lossy
    right, _ = module._reduce(_place())
    assert right == (dist.get_rank() == 0)
