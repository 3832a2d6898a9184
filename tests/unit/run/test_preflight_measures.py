"""The preflight's measures: no rank is the one that others are held against, and limits hold on both sides."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import pytest

from pipeline.run import preflight as module
from pipeline.run.preflight import judge
from tests.unit.run.test_preflight import MB, reports


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize("fault", [{"device": "cpu"}, {"clock": 1e9 - 60}, {"versions": "torch 1"}])
def test_whichever_rank_is_odd_is_named(rank, fault):
    found = reports()
    found[rank] = replace(found[rank], **fault)
    assert list(judge(found, 100 * MB)) == [f"n{rank // 2}"]


@pytest.mark.parametrize(
    ("nearly", "wrong"),
    [
        ({"device_free_gb": 112.0}, {"device_free_gb": 111.9}),  # of 140
        ({"clock": 1e9 + 9.5}, {"clock": 1e9 + 10.5}),
        ({"clock": 1e9 - 9.5}, {"clock": 1e9 - 10.5}),
        ({"free_bytes": 100 * MB}, {"free_bytes": 100 * MB - 1}),
    ],
)
def test_how_much_is_too_much(nearly, wrong):
    found = reports()
    found[2] = replace(found[2], **nearly)
    assert judge(found, 100 * MB) == {}
    found[2] = replace(found[2], **wrong)
    assert list(judge(found, 100 * MB)) == ["n1"]


def test_every_bad_node_is_named():
    found = reports()
    found[0] = replace(found[0], sees_folder=False)
    found[5] = replace(found[5], computes_right=False)
    assert list(judge(found, 100 * MB)) == ["n0", "n2"]


def test_the_disk_must_have_room_for_a_checkpoint_like_the_newest(tmp_path):
    assert module._needed(tmp_path) == module.SPARE_BYTES
    for step, size in ((9, 1000), (10, 10)):
        part = tmp_path / "checkpoints" / f"step-{step:08d}" / "ranks"
        part.mkdir(parents=True)
        (part / "0").write_bytes(bytes(size))
        (part.parent / "manifest").write_bytes(bytes(1))
    assert module._needed(tmp_path) == module.SPARE_BYTES + 11


def test_bad_nodes_of_earlier_attempts_stay_known(tmp_path):
    module._remember(tmp_path / module.BAD_NODES, {"n1": "is down"})
    module._remember(tmp_path / module.BAD_NODES, {"n2": "has a clock that is +60 s off"})
    assert set(json.loads((tmp_path / module.BAD_NODES).read_text())) == {"n1", "n2"}


def test_a_node_is_called_as_slurm_calls_it(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert module.node_name() == "gpu-17"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert module.node_name() == platform.node()


def test_a_folder_that_cannot_be_written_or_even_entered_has_no_speed(tmp_path):
    (tmp_path / "file").touch()
    assert module._write_speed(tmp_path / "file", 0) is None
    speed = module._write_speed(tmp_path, 0)
    assert speed is not None and speed > 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
