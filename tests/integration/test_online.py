"""Evaluation during training changes no bit of the run, and what follows from it does not depend on kills."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from pipeline.record.quality import Quality
from pipeline.record.results import read_results
from tests import toy_evals
from tests.integration.runs import TIMING, codes, die_at, metrics, notes, overrides, rank_body, run, steps_of
from tests.ranks import start_ranks

SUITE = """
batch = 16
workers = 0
[streams]
train = "{shards}/train"
val = "{shards}/val"
[[evals]]
name = "knn"
k = [5]
[[evals]]
name = "rank"
"""
ENGINES = {
    "accelerate": ["engine.name=accelerate", "engine.precision=fp32"],
    "zero1": ["engine.name=deepspeed", "engine.zero=1", "engine.precision=bf16"],
    "zero3": ["engine.name=deepspeed", "engine.zero=3", "engine.precision=fp32"],
}
BATCH_NORM = [
    "objective.encoder_args={layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]}",
    "data.image={size=16, views=2}",
]
"""A small network with statistics that looking must not move."""
TIMING |= {"online_seconds"}


@pytest.fixture(scope="module")
def suite(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suites") / "online.toml"
    path.write_text(SUITE.format(shards=glyphs))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))


def weights(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every file of every checkpoint."""
    saved = sorted((folder / "checkpoints").glob("step-*"))
    return {at.name: {p.name: p.read_bytes() for p in at.glob("*.safetensors")} for at in saved}


def online(suite: Path, *more: str) -> list[str]:
    return [f"online={{suite='{suite}', every='3ba'{''.join(', ' + m for m in more)}}}"]


@pytest.mark.parametrize(
    ("objective", "engine", "world"),
    [
        ("simclr", "accelerate", 1),
        pytest.param("supervised", "accelerate", 2, marks=pytest.mark.slow),
        pytest.param("mae", "zero1", 1, marks=pytest.mark.slow),
        ("mae", "zero1", 2),
        pytest.param("mae", "zero3", 1, marks=pytest.mark.slow),
        pytest.param("mae", "zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_it_changes_no_bit(objective, engine, world, suite, glyphs, tmp_path):
    """Parameters, optimizer, averages, digests and losses are those of the run without it, also after a kill in it."""
    plain, looked = tmp_path / "plain", tmp_path / "looked"
    more = [*ENGINES[engine], "ema.decay=0.9", "run.keep=9", *(BATCH_NORM if objective == "simclr" else [])]
    assert codes(run(world, objective, overrides(plain, glyphs / "train", *more))) == [0] * world
    settings = overrides(looked, glyphs / "train", *more, *online(suite))
    ended = run(world, objective, settings, hurt=partial(die_in_evaluation, 6))
    assert codes(ended) == [-9] * world
    assert steps_of(looked)[-1] == 6
    begun = {(row.model, row.evaluation) for row in read_results(looked).rows}
    assert ("step 6, ema", "knn") in begun and ("step 6, ema", "rank") not in begun
    assert codes(run(world, objective, settings)) == [0] * world
    assert metrics(looked) == metrics(plain)
    assert weights(looked) == weights(plain)
    assert measured(looked) == {f"step {step}, ema" for step in (0, 3, 6, 9, 12)}


def measured(folder: Path) -> set[str]:
    return {row.model for row in read_results(folder).rows}


def die_in_evaluation(step: int) -> None:
    """Kill all ranks, as a launcher does when one dies, in the middle of a step's evaluation."""
    import os
    import signal

    from pipeline.run.online import Judge
    from pipeline.suites.running import Runner

    look, measure = Judge.look, Runner.run

    def then_die(judge, clock):
        if clock.step == step:
            judge.job.saver.finish()
            Runner.run = die_at_the_second
        look(judge, clock)

    def die_at_the_second(runner, task):
        if task.name == "rank":
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(runner, task)

    Judge.look = then_die


def test_its_numbers_are_those_of_the_checkpoint(suite, glyphs, tmp_path):
    """What `sluice eval` measures on a step's checkpoint is there already."""
    from pipeline.run.__main__ import main

    folder = tmp_path / "run"
    more = [*ENGINES["zero3"], "run.keep=9", *online(suite)]
    assert codes(run(2, "mae", overrides(folder, glyphs / "train", *more))) == [0, 0]
    before = {(row.model, row.metric): (row.value, row.weights, row.time) for row in read_results(folder).rows}
    assert main(["eval", "--run", f"{folder}@all", "--suite", str(suite)]) == 0
    after = {(row.model, row.metric): (row.value, row.weights, row.time) for row in read_results(folder).rows}
    assert after == before and {model for model, _ in after} == {f"step {n}" for n in (0, 3, 6, 9, 12)}
    line = metrics(folder)[12]
    assert "online_seconds" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert "knn/top1_k5" not in line, "metrics are those of training"


def test_one_that_fails_on_one_rank_is_told_and_training_goes_on(suite, glyphs, tmp_path):
    hurt, plain = tmp_path / "hurt", tmp_path / "plain"
    toy_evals.admit()
    bad = suite.with_name("bad.toml")
    bad.write_text(suite.read_text() + '[[evals]]\nname = "misbehave"\nhow = "crashes"\nrank = 1\n')
    more = ENGINES["zero1"]
    settings = overrides(hurt, glyphs / "train", *more, *online(bad))
    command = {"config": str(Path("configs/smoke/mae.toml").resolve()), "settings": settings, "hurt": toy_evals.admit}
    assert codes(start_ranks(2, rank_body, **command)) == [0, 0]
    assert codes(run(2, "mae", overrides(plain, glyphs / "train", *more))) == [0, 0]
    assert metrics(hurt) == metrics(plain) and weights(hurt) == weights(plain)
    assert "evaluation at step 3 has failed: misbehave" in notes(hurt)
    assert {row.evaluation for row in read_results(hurt).rows} == {"knn", "rank"}
    assert len(measured(hurt)) == 5


def test_the_best_stays_and_patience_ends_the_run(suite, glyphs, tmp_path):
    """By values that are given: the best at step 6, and nothing better in two evaluations after it."""
    folder = tmp_path / "run"
    best = online(suite, "best='knn/top1_k5'", "patience=2")
    more = [*ENGINES["accelerate"], "run.length=30ba", "run.keep=1", "every.checkpoint=4ba", *best]
    settings = overrides(folder, glyphs / "train", *more)
    values = {3: 0.1, 6: 0.4, 9: 0.3, 12: 0.2, 15: 0.9}
    ended = run(1, "supervised", settings, hurt=partial(pretend, values, kill_at=8))
    assert codes(ended) == [-9]
    assert steps_of(folder) == [6], "saved though none was due"
    assert codes(run(1, "supervised", settings, hurt=partial(pretend, values))) == [0]
    assert steps_of(folder) == [6, 12], "the best stays though it is not the newest"
    kept = json.loads((folder / "quality.json").read_text())
    assert kept["best"] == 6 and kept["values"] == [[3, 0.1], [6, 0.4], [9, 0.3], [12, 0.2]]
    assert "has not become better since step 6, in 2 evaluations: the run ends at step 12" in notes(folder)
    assert '"finished"' in (folder / "state.json").read_text()
    # started again it has nothing to do
    assert codes(run(1, "supervised", settings, hurt=partial(pretend, values))) == [0]
    assert max(metrics(folder)) == 12


def pretend(values: dict[int, float], kill_at: int | None = None) -> None:
    """Evaluations give the values that they are told to."""
    from dataclasses import replace

    from pipeline.suites.online import Online
    from pipeline.suites.online import Quality as Found

    evaluate = Online.evaluate

    def told(self, engine, step, alive):
        rows, problems = evaluate(self, engine, step, alive)
        return Found([replace(row, value=values[step]) if step in values else row for row in rows], problems)

    Online.evaluate = told
    if kill_at is not None:
        die_at(kill_at, rank=0)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("k = [0]", "k[0]: expected a number >= 1"),
        (
            'k = [5]\n[[evals]]\nname = "finetune"',
            "finetune trains a model of its own, which cannot be done within a run",
        ),
    ],
)
def test_a_suite_that_cannot_be_is_refused_before_the_first_step(new, said, suite, glyphs, tmp_path):
    wrong = suite.with_name("wrong.toml")
    wrong.write_text(suite.read_text().replace("k = [5]", new))
    settings = overrides(tmp_path / "run", glyphs / "train", *ENGINES["accelerate"], *online(wrong))
    assert codes(run(1, "mae", settings)) == [2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")
    assert said in (tmp_path / "run" / "state.json").read_text()


def test_the_best_value_and_how_long_ago_it_was():
    quality = Quality("m")
    for step, value in ((1, 0.5), (2, float("nan")), (3, 0.5), (4, 0.4)):
        quality.add(step, value, "higher")
    assert quality.best == 1 and quality.without_gain == 3
    quality.add(3, 0.6, "higher")  # done again; step 4 was given up
    assert quality.values.keys() == {1, 2, 3} and quality.best == 3 and quality.without_gain == 0
    quality.add(4, 0.3, "lower")
    assert quality.best == 4
    assert Quality("m").best is None and Quality("m").without_gain == 0
