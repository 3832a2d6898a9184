"""Training runs for tests: a tiny configuration, started as real ranks in this checkout."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load
from pipeline.core.protocols import Clock
from pipeline.run import train as training
from tests import toys
from tests.ranks import Ended, start_ranks

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
TIMING = {"survey_seconds", "samples_per_second", "data_wait", "step_seconds", "memory_gb", "attempt"}
"""What may differ between two runs of the same thing."""


def overrides(folder: Path, shards: Path, *more: str) -> list[str]:
    """Settings of a run of 12 steps that logs each one and saves every third."""
    return [
        f"run.folder='{folder}'",
        f"data.train='{shards}'",
        "run.length=12ba",
        "every.log=1ba",
        "every.checkpoint=3ba",
        "every.showcase=0ba",
        "run.global_batch=8",
        "engine.micro_batch=2",
        "optimizer.clip=0.5",
        *more,
    ]


def run(world: int, objective: str, settings: list[str], hurt: Callable[[], None] | None = None) -> list[Ended]:
    """Train a smoke config to its end on ``world`` ranks; ``hurt`` is called first in every rank."""
    return start_ranks(world, rank_body, config=str(SMOKE / f"{objective}.toml"), settings=settings, hurt=hurt)


def run_toy(world: int, toy: str, settings: list[str], hurt: Callable[[], None] | None = None) -> list[Ended]:
    """The same, of one of the tests' own objectives; ``settings`` begin with the run's folder."""
    folder = Path(settings[0].removeprefix("run.folder='").removesuffix("'"))
    config = folder.with_name(f"{folder.name}.toml")
    config.write_text(load.dump(toys.smoke_config(toy)))
    return start_ranks(world, rank_body, config=str(config), settings=settings, hurt=hurt)


def rank_body(config: str, settings: list[str], hurt: Callable[[], None] | None) -> int:
    """One rank, through the program's own entry."""
    from pipeline.run.__main__ import main

    toys.admit()
    if hurt is not None:
        hurt()
    command = ["train", "--config", config]
    for setting in settings:
        command += ["--set", setting]
    return main(command)


def codes(ended: list[Ended]) -> list[int | None]:
    """Exit code that each rank gave, or minus the signal that killed it."""
    return [e.value if e.problem is None else e.exit_code for e in ended]


def die_at(step: int, rank: int = 1) -> None:
    """Kill this rank, without warning, when ``step`` has been logged, what was saved before is there, and it is not."""
    log = training.Job.log

    def then_die(job: Any, clock: Clock) -> None:
        log(job, clock)
        if clock.step == step:
            job.saver.finish()
            if job.place.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)

    training.Job.log = then_die  # type: ignore[method-assign]


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Last line of each step, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if k not in TIMING} for line in lines}


def same_course(found: Path, expected: Path, prefixes: tuple[str, ...] = ("",), slack: float = 1.0) -> None:
    """The batches are the same, and losses and gradients but for the order of sums: ``slack`` times the tolerance.

    ``prefixes`` are those of the phases' metrics.
    """
    lines = metrics(found)
    for number, line in metrics(expected).items():
        assert lines[number]["data_digest"] == line["data_digest"], number
        for prefix in prefixes:
            for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
                value = pytest.approx(line[prefix + name], rel=tolerance * slack)
                assert lines[number][prefix + name] == value, (number, prefix + name)


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit())


def notes(folder: Path) -> str:
    """What the run has said."""
    return (folder / "notes.jsonl").read_text()
