"""The same step failing again and again, in whatever way, stops the run until a person has looked at it."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.protocols import Clock
from pipeline.record.logs import log_path
from pipeline.run import train as training
from tests.faults.conftest import OWN
from tests.faults.launched import die
from tests.integration.runs import codes, metrics, overrides, run, steps_of


def fail_at(step: int, how: str) -> None:
    """Raise or die in the log action of this step."""
    log = training.Job.log

    def then_fail(job: Any, clock: Clock) -> None:
        log(job, clock)
        if clock.step == step:
            job.saver.finish()
            if how == "raise":
                raise RuntimeError("a bad cable")
            die(job.folder)

    training.Job.log = then_fail  # type: ignore[method-assign]


@pytest.mark.fault(10, "the same step failing three times")
def test_the_fourth_start_is_refused(whole: Path, glyphs: Path, tmp_path: Path, fault_row: Any) -> None:
    fault_row.case = "1 rank: an exception, then SIGKILL, then an exception"
    settings = overrides(tmp_path, glyphs / "train", *OWN)
    ends = [codes(run(1, "supervised", settings, hurt=partial(fail_at, 5, how))) for how in ("raise", "kill", "raise")]
    assert ends == [[1], [-9], [1]]
    state = (tmp_path / "state.json").read_bytes()
    for _ in range(2):  # however often
        began = time.monotonic()
        assert codes(run(1, "supervised", settings)) == [2]
        fault_row.seconds, fault_row.until = time.monotonic() - began, "stopped"
    said = log_path(tmp_path, 0).read_text()
    assert f"step 5 of {tmp_path} has failed 3 times in a row" in said and "a bad cable" in said
    assert f"remove {tmp_path}/failures.jsonl" in said
    assert (tmp_path / "state.json").read_bytes() == state and steps_of(tmp_path) == [3]

    os.remove(tmp_path / "failures.jsonl")
    assert codes(run(1, "supervised", settings)) == [0]
    digests = [{n: line["data_digest"] for n, line in metrics(folder).items()} for folder in (tmp_path, whole)]
    assert digests[0] == digests[1]
    fault_row.outcome = "the fourth start exits with 2, names step and error; goes on when told to"
