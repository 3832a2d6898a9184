"""Asked to stop, all ranks save in the same step and end with 75; started again, the run goes on as if nothing was."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.protocols import Clock
from pipeline.run import train as training
from tests.integration.runs import codes, metrics, notes, overrides, run, steps_of

OWN = ["engine.name=accelerate", "engine.precision=fp32"]


def ask_at(step: int, how: str) -> None:
    """Ask rank 1 alone to stop, by a signal, or all by the file, after ``step``."""
    log = training.Job.log

    def then_ask(job: Any, clock: Clock) -> None:
        log(job, clock)
        if clock.step == step and job.place.rank == 1:
            if how == "file":
                (job.folder / "stop").touch()
            else:
                os.kill(os.getpid(), signal.Signals[how])

    training.Job.log = then_ask  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN))) == [0, 0]
    return folder


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "file"])
def test_a_request_to_one_rank_stops_all_and_nothing_is_lost(how, whole, glyphs, tmp_path):
    folder = tmp_path / "run"
    settings = overrides(folder, glyphs / "train", *OWN)
    assert codes(run(2, "supervised", settings, hurt=partial(ask_at, 4, how))) == [75, 75]
    assert steps_of(folder) == [3, 5]  # asked after step 4, agreed and saved with step 5
    assert '"requeue"' in (folder / "state.json").read_text()
    assert "stopped at step 5" in notes(folder)

    assert codes(run(2, "supervised", settings)) == [0, 0]
    assert metrics(folder) == metrics(whole)
    assert '"finished"' in (folder / "state.json").read_text()
