"""Killed on two ranks, and resumed on one rank fewer and one more: no sample is lost or repeated."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from tests.faults.launched import note_first_step, note_time, recovery
from tests.integration.runs import codes, die_at, metrics, overrides, run

ADAMW = "optimizer.weight_decay=0.1"  # two groups: norms and biases are not decayed
LARS = ("optimizer.name=lars", "optimizer.lr=0.1")
KINDS = {f"ZeRO {stage}, AdamW": ("engine.name=deepspeed", f"engine.zero={stage}", ADAMW) for stage in range(4)}
KINDS |= {"ZeRO 0, LARS": ("engine.name=deepspeed", "engine.zero=0", *LARS)}
KINDS |= {"Accelerate, LARS": ("engine.name=accelerate", *LARS)}


@pytest.mark.slow
@pytest.mark.fault(12, "resume on one rank fewer and one more")
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks(kind, glyphs, tmp_path, fault_row):
    def settings(name):
        return overrides(tmp_path / name, glyphs / "train", *KINDS[kind], "engine.precision=fp32", *shape)

    shape = ("run.global_batch=12",)
    assert codes(run(2, "supervised", settings("whole"))) == [0, 0]
    assert codes(run(2, "supervised", settings("killed"), hurt=partial(die_at, 8)))[1] == -9
    note_time(tmp_path / "killed", "fault")
    expected, seconds = metrics(tmp_path / "whole"), []
    for world in (1, 3):
        folder = tmp_path / f"on-{world}"
        shutil.copytree(tmp_path / "killed", folder)
        assert codes(run(world, "supervised", settings(folder.name), hurt=note_first_step)) == [0] * world
        seconds.append(recovery(folder))
        found = metrics(folder)
        for step, line in expected.items():
            assert found[step]["data_digest"] == line["data_digest"], step
            assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), step
            assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3), step
    fault_row.case, fault_row.seconds = f"2 to 1 and 3 ranks, {kind}", seconds[0]
    fault_row.outcome = "same batches; losses as undisturbed but for the order of sums"
