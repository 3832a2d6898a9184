"""Runs of an objective with phases: what is logged and saved of each, and that they resume, anywhere."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.integration.runs import codes, die_at, metrics, notes, overrides, run_toy, same_course

ENGINES = {
    "accelerate": ["engine={name='accelerate', precision='fp32', micro_batch=2}"],
    **{f"zero{n}": [f"engine={{name='deepspeed', zero={n}, precision='fp32', micro_batch=2}}"] for n in range(3)},
}
PHASES = [
    "phases={critic={updates=2, optimizer={name='adamw', lr=4e-3, betas=[0.5, 0.9], clip=0.05}}}",
    "objective.limit=0.2",
    "ema={decay=0.9}",
]


def settings(folder: Path, shards: Path, *more: str) -> list[str]:
    return overrides(folder, shards, *PHASES, *more)


def test_in_bf16_it_resumes_bit_for_bit(glyphs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    engine = "engine={name='deepspeed', zero=2, precision='bf16', micro_batch=2}"
    assert codes(run_toy(2, "toy_gan", settings(whole, glyphs / "train", engine))) == [0, 0]
    again = settings(killed, glyphs / "train", engine)
    assert codes(run_toy(2, "toy_gan", again, partial(die_at, 8)))[1] == -9
    assert codes(run_toy(2, "toy_gan", again)) == [0, 0]
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize(
    ("engine", "later_engine", "later_world"),
    [
        pytest.param("accelerate", "zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero0", "accelerate", 4, marks=pytest.mark.slow),
        ("zero1", "accelerate", 1),
        pytest.param("zero2", "zero1", 4, marks=pytest.mark.slow),
    ],
)
def test_killed_it_resumes_bit_for_bit_and_elsewhere(engine, later_engine, later_world, glyphs, tmp_path):
    shards = glyphs / "train"
    whole, killed, elsewhere = tmp_path / "whole", tmp_path / "killed", tmp_path / "elsewhere"
    assert codes(run_toy(2, "toy_gan", settings(whole, shards, *ENGINES[engine]))) == [0, 0]
    kill = partial(die_at, 8)
    assert codes(run_toy(2, "toy_gan", settings(killed, shards, *ENGINES[engine]), kill))[1] == -9
    shutil.copytree(killed, elsewhere)
    assert codes(run_toy(2, "toy_gan", settings(killed, shards, *ENGINES[engine]))) == [0, 0]
    assert metrics(killed) == metrics(whole)
    assert "step-00000006 at step 6" in notes(killed)
    tensors = [(p / "checkpoints" / "step-00000012" / "rank-00000.safetensors").read_bytes() for p in (killed, whole)]
    assert tensors[0] == tensors[1]

    later = settings(elsewhere, shards, *ENGINES[later_engine])
    assert codes(run_toy(later_world, "toy_gan", later)) == [0] * later_world
    same_course(elsewhere, whole, ("critic/", "generator/"))


def test_each_phase_is_in_the_metrics_and_in_the_checkpoint(glyphs, tmp_path):
    whole = settings(tmp_path, glyphs / "train", *ENGINES["accelerate"], "schedule={name='constant', warmup='4ba'}")
    assert codes(run_toy(1, "toy_gan", whole)) == [0]
    lines = metrics(tmp_path)
    for step, line in lines.items():
        ramp = min(1.0, (step - 0.5) / 4)
        assert line["generator/lr"] == pytest.approx(1e-2 * ramp) and line["critic/lr"] == pytest.approx(4e-3 * ramp)
        assert line["generator/grad_norm"] > 0 and line["critic/grad_norm"] > 0
        assert line["loss"] == pytest.approx(line["generator/loss"] + line["critic/loss"])
        assert {"generator/fooled", "critic/real", "critic/fake"} <= line.keys()
        assert "lr" not in line and "grad_norm" not in line
    saved = json.loads((tmp_path / "checkpoints" / "step-00000012" / "checkpoint.json").read_text())
    assert saved["state"]["config"]["phases"]["critic"]["updates"] == 2
    assert saved["state"]["config"]["phases"]["critic"]["optimizer"]["clip"] == 0.05
    for kind in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step", "ema"):
        assert {f"{kind}/generator.0.weight", f"{kind}/critic.0.weight"} <= saved["tensors"].keys()
