"""Killed and resumed, a run goes on as if nothing had happened: same batches, same losses, at any world size."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from pipeline.dist.group import from_first
from pipeline.run import train as training
from tests.integration.runs import codes, die_at, metrics, notes, overrides, run, same_course, steps_of

ENGINES = {
    "accelerate": ["engine.name=accelerate"],
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero={stage}"] for stage in range(4)},
}
LENGTH, EVERY = 12, 3


@pytest.mark.parametrize(
    ("engine", "objective", "later_engine", "later_world"),
    [
        ("accelerate", "mae", "zero1", 4),
        pytest.param("zero0", "mae", "zero0", 4, marks=pytest.mark.slow),
        pytest.param("zero1", "supervised", "zero1", 4, marks=pytest.mark.slow),
        pytest.param("zero2", "mae", "zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero3", "mae", "zero3", 4, marks=pytest.mark.slow),
        ("zero3", "supervised", "accelerate", 1),
    ],
)
def test_killed_at_a_random_step_it_resumes(engine, objective, later_engine, later_world, glyphs, tmp_path):
    def settings(folder: Path, engine: str) -> list[str]:
        return overrides(folder, glyphs / "train", *ENGINES[engine], "engine.precision=fp32")

    whole, killed, elsewhere = tmp_path / "whole", tmp_path / "killed", tmp_path / "elsewhere"
    assert codes(run(2, objective, settings(whole, engine))) == [0, 0]
    step = random.randint(EVERY + 1, LENGTH - 1)
    saved = (step - 1) // EVERY * EVERY
    assert codes(run(2, objective, settings(killed, engine), hurt=partial(die_at, step)))[1] == -9
    assert steps_of(killed)[-1] == saved, f"killed at step {step}"
    shutil.copytree(killed, elsewhere)

    assert codes(run(2, objective, settings(killed, engine))) == [0, 0]
    assert metrics(killed) == metrics(whole), f"killed at step {step}"
    assert f"step-{saved:08d} at step {saved}" in notes(killed)

    assert codes(run(later_world, objective, settings(elsewhere, later_engine))) == [0] * later_world
    same_course(elsewhere, whole)


@pytest.mark.parametrize("engine", [pytest.param("accelerate", marks=pytest.mark.slow), "zero2"])
def test_in_bf16_and_with_drop_path_it_resumes_bit_for_bit(engine, glyphs, tmp_path):
    """What is dropped belongs to the sample, and so needs no state."""
    more = [*ENGINES[engine], "engine.precision=bf16", "objective.encoder_args.drop_path_rate=0.5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert codes(run(2, "supervised", overrides(whole, glyphs / "train", *more))) == [0, 0]
    settings = overrides(killed, glyphs / "train", *more)
    assert codes(run(2, "supervised", settings, hurt=partial(die_at, 5)))[1] == -9
    assert codes(run(2, "supervised", settings)) == [0, 0]
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize("engine", [pytest.param("accelerate", marks=pytest.mark.slow), "zero3"])
def test_three_resumes_in_a_row_at_three_world_sizes(engine, glyphs, tmp_path):
    """What a second resume loses, the first one has not written back."""

    def settings(folder: Path, *more: str) -> list[str]:
        return overrides(folder, glyphs / "train", *ENGINES[engine], "engine.precision=fp32", *more)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert codes(run(2, "mae", settings(whole))) == [0, 0]
    for world, step in ((1, 4), (4, 7), (2, 10)):
        ended = codes(run(world, "mae", settings(broken), hurt=partial(die_at, step, rank=world - 1)))
        assert ended[world - 1] == -9
    assert codes(run(1, "mae", settings(broken))) == [0]
    same_course(broken, whole)


@pytest.mark.parametrize("engine", ["accelerate", pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_what_is_loaded_and_saved_again_is_the_same_to_the_byte(engine, glyphs, tmp_path):
    """Save, load, save, load, save, without a step between."""
    folder = tmp_path / "run"
    more = [*ENGINES[engine], "engine.precision=fp32", "run.length=3ba", "ema.decay=0.9"]
    settings = overrides(folder, glyphs / "train", *more)
    assert codes(run(2, "mae", settings)) == [0, 0]
    saved = folder / "checkpoints" / "step-00000003"
    first = {p.name: p.read_bytes() for p in saved.glob("*.safetensors")}
    assert len(first) == 2
    for _ in range(2):
        assert codes(run(2, "mae", settings, hurt=save_again)) == [0, 0]
        assert {p.name: p.read_bytes() for p in saved.glob("*.safetensors")} == first
        assert (saved / "again").read_text() == "2"
        (saved / "again").unlink()


def save_again() -> None:
    """Let a run that has nothing left to do save what it has loaded, in place of what it has loaded it from."""
    end = training.Job.end

    def save_and_end(job, outcome, clock, stop):
        shutil.rmtree(job.saver.store.path(clock.step)) if job.place.first else None
        from_first(None)
        job.checkpoint(clock)
        job.saver.finish()
        if job.place.first:
            (job.saver.store.path(clock.step) / "again").write_text(str(job.place.world_size))
        return end(job, outcome, clock, stop)

    training.Job.end = save_and_end
