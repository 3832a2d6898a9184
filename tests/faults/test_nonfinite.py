"""A loss that is not finite on one rank stops all ranks in the same step, and nothing of it is saved."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.launched import note_time
from tests.integration.runs import codes, metrics, overrides, run, steps_of


def spoil(objective: str, folder: Path, step: int, value: float) -> None:
    """Give rank 1 a loss of ``value`` in one step."""
    from pipeline.core import registry
    from pipeline.core.protocols import Objective, StepOutput

    cls = registry.component("pipeline.objectives", objective, Objective)
    forward = cls.forward

    def spoilt(self: Any, batch: Any, ctx: Any) -> StepOutput:
        output = forward(self, batch, ctx)
        if ctx.clock.step + 1 == step and ctx.training and os.environ["RANK"] == "1":
            note_time(folder, "fault")
            return output._replace(loss=output.loss * value)
        return output

    cls.forward = spoilt  # type: ignore[method-assign]


@pytest.mark.fault(9, "NaN or Inf on one rank")
@pytest.mark.parametrize(
    ("engine", "value"),
    [
        pytest.param(["engine.name=deepspeed", "engine.zero=0"], float("nan"), marks=pytest.mark.slow),
        pytest.param(["engine.name=deepspeed", "engine.zero=1"], float("-inf"), marks=pytest.mark.slow),
        pytest.param(["engine.name=deepspeed", "engine.zero=2"], float("inf"), marks=pytest.mark.slow),
        (["engine.name=deepspeed", "engine.zero=3"], float("inf")),
        (["engine.name=accelerate"], float("nan")),
    ],
)
def test_all_ranks_stop_in_the_same_step(engine, value, whole, glyphs, tmp_path, fault_row):
    fault_row.case = f"2 ranks, {value}, {', '.join(engine)}"
    folder: Path = tmp_path / "run"
    settings = overrides(folder, glyphs / "train", *engine, "engine.precision=fp32")
    ended = run(2, "supervised", settings, hurt=partial(spoil, "supervised", folder, 6, value))
    fault_row.seconds, fault_row.until = time.time() - float((folder / "time-of-fault").read_text()), "stopped"
    assert codes(ended) == [70, 70]
    assert steps_of(folder) == [3]  # step 6 would have been saved
    state = (folder / "state.json").read_text()
    assert "step 6: the loss of rank 1 is" in state and '"exit_code": 70' in state
    assert codes(run(2, "supervised", settings)) == [0, 0]  # a batch that was bad once: the run goes on from step 3
    assert steps_of(folder) == [6, 9, 12]
    digests = [{n: line["data_digest"] for n, line in metrics(at).items()} for at in (folder, whole)]
    assert digests[0] == digests[1]
    fault_row.outcome = "all stop in that step with exit 70; started again, same batches from the checkpoint before"
