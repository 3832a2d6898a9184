"""Runs that survey their data: killed in the middle of one they resume bit for bit, and its time is told."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import registry
from pipeline.core.manifest import load
from pipeline.core.protocols import Objective
from tests import toys
from tests.integration.runs import codes, die_at, metrics, overrides, run, run_toy, steps_of
from tests.unit.data.shards import members, write_data

ENGINES = {
    "accelerate": "engine={name='accelerate', precision='fp32', micro_batch=2}",
    **{f"zero{n}": f"engine={{name='deepspeed', zero={n}, precision='fp32', micro_batch=2}}" for n in (2, 3)},
}


def settings(folder: Path, shards: Path, every: str, engine: str, *more: str) -> list[str]:
    return overrides(folder, shards, ENGINES[engine], f"objective.every='{every}'", *more)


def hurt_in_survey(step: int, how: signal.Signals = signal.SIGKILL, objective: str = "toy_survey") -> None:
    """Send rank 1 a signal in its second look of the survey after ``step`` updates."""
    toys.admit()
    surveyed: Any = registry.component("pipeline.objectives", objective, Objective)
    look, seen = surveyed.look, []

    def then_die(self: Any, survey: str, batch: Any, ctx: Any) -> Any:
        if ctx.clock.step == step and os.environ["RANK"] == "1":
            seen.append(survey)
            if len(seen) == 2:
                os.kill(os.getpid(), how)
        return look(self, survey, batch, ctx)

    surveyed.look = then_die


@pytest.mark.parametrize(
    ("every", "killed_at", "engine"),
    [("5ba", 5, "accelerate"), pytest.param("3ba", 6, "zero2", marks=pytest.mark.slow), ("0.3ep", 0, "zero3")],
)
def test_killed_in_a_survey_it_resumes_bit_for_bit(every, killed_at, engine, glyphs, tmp_path):
    shards, whole, killed = glyphs / "train", tmp_path / "whole", tmp_path / "killed"
    assert codes(run_toy(2, "toy_survey", settings(whole, shards, every, engine))) == [0, 0]
    hurt = partial(hurt_in_survey, killed_at)
    assert codes(run_toy(2, "toy_survey", settings(killed, shards, every, engine), hurt))[1] == -9
    assert codes(run_toy(2, "toy_survey", settings(killed, shards, every, engine))) == [0, 0]
    assert metrics(killed) == metrics(whole)
    for rank in range(2):
        file = Path("checkpoints", "step-00000012", f"rank-{rank:05d}.safetensors")
        assert (whole / file).read_bytes() == (killed / file).read_bytes()


def test_deep_cluster_killed_in_a_survey_resumes_bit_for_bit_with_clusters_and_fresh_classifier(glyphs, tmp_path):
    """The survey at step 6 is the second one: what it makes rests on clusters, weights and momentum before it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("engine.micro_batch=4", "optimizer.lr=1e-2", "optimizer.betas=[0.9,0.9]")

    def own(folder: Path) -> list[str]:
        return overrides(folder, glyphs / "train", *more)

    assert codes(run(2, "deep_cluster", own(whole))) == [0, 0]
    hurt = partial(hurt_in_survey, 6, objective="deep_cluster")
    assert codes(run(2, "deep_cluster", own(killed), hurt))[1] == -9
    assert steps_of(killed)[-1] in (3, 6), "what step 6 saves is written while the survey begins"
    assert codes(run(2, "deep_cluster", own(killed))) == [0, 0]
    assert metrics(killed) == metrics(whole)
    assert len({line["nmi"] for line in metrics(whole).values()}) > 2
    for rank in range(2):
        file = Path("checkpoints", "step-00000012", f"rank-{rank:05d}.safetensors")
        assert (whole / file).read_bytes() == (killed / file).read_bytes()


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_asked_to_stop_in_a_survey_it_saves_and_goes_on_as_if_nothing_had_happened(step, glyphs, tmp_path):
    shards, whole, stopped = glyphs / "train", tmp_path / "whole", tmp_path / "stopped"
    assert codes(run_toy(2, "toy_survey", settings(whole, shards, "5ba", "accelerate"))) == [0, 0]
    again = settings(stopped, shards, "5ba", "accelerate")
    assert codes(run_toy(2, "toy_survey", again, partial(hurt_in_survey, step, signal.SIGTERM))) == [75, 75]
    assert steps_of(stopped) == ([3, 5] if step else [])
    assert codes(run_toy(2, "toy_survey", again)) == [0, 0]
    assert metrics(stopped) == metrics(whole)


def test_one_rank_two_ranks_and_zero_3_agree_and_resume_each_other(glyphs, tmp_path):
    shards, folders = glyphs / "train", {name: tmp_path / name for name in ("one", "two", "three")}
    assert codes(run_toy(1, "toy_survey", settings(folders["one"], shards, "0.2ep", "accelerate"))) == [0]
    two = settings(folders["two"], shards, "0.2ep", "zero2")
    assert codes(run_toy(2, "toy_survey", two, partial(die_at, 8)))[1] == -9
    shutil.copytree(folders["two"], folders["three"])
    assert codes(run_toy(2, "toy_survey", two)) == [0, 0]
    assert codes(run_toy(4, "toy_survey", settings(folders["three"], shards, "0.2ep", "zero3"))) == [0] * 4
    expected = metrics(folders["one"])
    per_epoch = load(shards).samples // 8
    due = sorted({math.ceil(Fraction(2 * number * per_epoch, 10)) for number in range(12)})
    assert due[2] < 12 and due[2] != 2 * due[1]
    assert {step: line["surveys"] for step, line in expected.items()} == {
        step: sum(before < step for before in due) for step in range(1, 13)
    }
    for name in ("two", "three"):
        for step, line in metrics(folders[name]).items():
            for key in ("loss", "wanted", "surveys"):
                assert line[key] == pytest.approx(expected[step][key], rel=1e-5), (name, step, key)


def test_a_data_set_beside_the_first_is_surveyed_and_bad_samples_are_replaced(glyphs, tmp_path):
    write_data(tmp_path / "far", [13, 6], lambda i: members(i) if i != 4 else {"png": b"<html>"}, {"image": ("png",)})
    more = [f"data.beside={{far={{path='{tmp_path / 'far'}'}}}}", "objective.data='far'", "data.max_bad=1.0"]
    folder = tmp_path / "run"
    assert codes(run_toy(2, "toy_survey", settings(folder, glyphs / "train", "4ba", "accelerate", *more))) == [0, 0]
    saved = [load_file(path) for path in sorted((folder / "checkpoints" / "step-00000012").glob("rank-*.safetensors"))]
    table = torch.cat([part[name] for part in saved for name in sorted(part) if name.startswith("model/table@")])
    assert torch.equal(table == 0, torch.arange(19) == 4)
    text = "".join(path.read_text() for path in sorted(folder.glob("ledger-*.jsonl")))
    lines = [line for line in map(json.loads, text.splitlines()) if "survey" in line]
    first = load(glyphs / "train").samples
    found = [(line["survey"], line["step"], line["id"], line["substitute"]) for line in lines]
    assert found == [("distances", step, first + 4, first + 5) for step in (0, 4, 8)]
    assert all(line["key"] and line["shard"] and line["reason"] for line in lines)


def test_the_time_it_takes_is_in_the_metrics(glyphs, tmp_path):
    assert codes(run_toy(1, "toy_survey", settings(tmp_path, glyphs / "train", "5ba", "accelerate"))) == [0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["survey_seconds"] > 0] == [1, 6, 11]
