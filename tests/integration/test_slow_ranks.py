"""Of four real ranks one is slow: it is named, with what it is slow in, and no other is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest

from pipeline.data.stream import TrainStream
from pipeline.engine.base import SingleEngine
from pipeline.record.paces import read_paces
from pipeline.run import train as training
from tests.integration.runs import codes, metrics, notes, overrides, run

SLOW = 2
EVEN, MORE = 0.1, 0.4
"""Seconds: what every rank sleeps in each forward, so that the load of this machine is little beside it; and what the
slow one sleeps."""
ENGINES = {
    "accelerate": ["engine.name=accelerate"],
    **{f"zero {stage}": ["engine.name=deepspeed", f"engine.zero={stage}"] for stage in (0, 1, 2, 3)},
}


def burden(where: str) -> None:
    """Make every rank sleep in its forward, and one of them longer ``where``: "step", "data"; "nowhere": all alike."""
    slow = int(os.environ["RANK"]) == SLOW
    forward, batches = SingleEngine.forward, TrainStream.batches

    def slept(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(MORE if where == "nowhere" or (slow and where == "step") else EVEN)
        return forward(self, *args, **kwargs)

    def late(self: Any, step: int) -> Iterator[Any]:
        for batch in batches(self, step):
            time.sleep(MORE)
            yield batch

    SingleEngine.forward = slept  # type: ignore[method-assign]
    if slow and where == "data":
        TrainStream.batches = late  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("where", "engine"),
    [
        ("nowhere", "zero 1"),
        ("data", "accelerate"),
        pytest.param("step", "accelerate", marks=pytest.mark.slow),
        pytest.param("step", "zero 1", marks=pytest.mark.slow),
        ("step", "zero 3"),
        pytest.param("step", "zero 0", marks=pytest.mark.slow),
        pytest.param("step", "zero 2", marks=pytest.mark.slow),
    ],
)
def test_the_slow_rank_alone_is_named(where, engine, tmp_path, glyphs):
    length = ("run.length=10ba", "every.log=5ba", "every.checkpoint=0ba", "engine.slow_minutes=0.02")
    settings = overrides(tmp_path, glyphs / "train", *ENGINES[engine], "engine.precision=fp32", *length)
    assert codes(run(4, "supervised", settings, hurt=partial(burden, where))) == [0] * 4
    paces = read_paces(tmp_path)
    assert paces is not None and len(paces.own) == 4
    named = [] if where == "nowhere" else [(SLOW, where)]
    assert [(slow.rank, slow.phase) for slow in paces.slow] == named, paces.own
    said = notes(tmp_path)
    assert [rank for rank in range(4) if f"rank {rank} on" in said] == [rank for rank, _ in named]
    assert all(own[1] > EVEN for own in paces.own), "what was slept is its own"


def unmeasured() -> None:
    """Train as if nobody measured."""
    training.Pace = lambda waits: None  # type: ignore[assignment, misc]
    training._paces = lambda *parts: None
    training.Waits.listening = lambda self: nullcontext(self)  # type: ignore[method-assign]


def test_measuring_changes_no_bit(tmp_path, glyphs):
    found = []
    for name, hurt in (("measured", None), ("unmeasured", unmeasured)):
        settings = overrides(tmp_path / name, glyphs / "train", *ENGINES["zero 1"], "run.length=4ba")
        assert codes(run(2, "supervised", [*settings, "engine.slow_minutes=0.0001"], hurt=hurt)) == [0, 0]
        found.append(metrics(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 4
    assert [(tmp_path / name / "paces.json").exists() for name in ("measured", "unmeasured")] == [True, False]
