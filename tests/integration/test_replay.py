"""A past step, done again on one rank, is the step that was."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.record.losses import History
from tests.integration.runs import codes, metrics, notes, overrides, run
from tests.ranks import Ended, start_ranks

STEPS = 24
ENGINES = {"accelerate": ["engine.name=accelerate"], "zero3": ["engine.name=deepspeed", "engine.zero=3"]}


def replayed(folder: Path, step: int, world: int = 1) -> tuple[list[Ended], dict]:
    ended = start_ranks(world, _replay, arguments=["--run", str(folder), "--step", str(step)])
    path = folder / "replay" / f"step-{step:08d}" / "replay.json"
    return ended, json.loads(path.read_text()) if path.exists() else {}


def _replay(arguments: list[str]) -> int:
    from pipeline.run.__main__ import main

    return main(["replay", *arguments])


@pytest.fixture(scope="module")
def course(glyphs, tmp_path_factory):
    """A run of two ranks, with the loss of every sample."""
    folder = tmp_path_factory.mktemp("course") / "run"
    more = ["engine.precision=fp32", f"run.length={STEPS}ba", "every.checkpoint=5ba", "run.keep=2"]
    settings = overrides(folder, glyphs / "train", *ENGINES["zero3"], *more, "record.losses='every epoch'")
    assert codes(run(2, "mae", settings)) == [0, 0]
    return folder


def test_random_steps_equal_the_log(course):
    """Before the oldest checkpoint that is left, and after the newest."""
    before = {p: p.read_bytes() for p in sorted(course.rglob("*")) if p.is_file() and "replay" not in p.parts}
    log = metrics(course)
    for step in (random.randint(1, 20), random.randint(21, 23), STEPS):
        ended, found = replayed(course, step)
        assert codes(ended) == [0], ended
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(log[step][name], rel=1e-6), step
        assert found["data_digest"] == log[step]["data_digest"] and found["logged"]["loss"] == log[step]["loss"]
        usable = [known for known in (20, 24) if known < step]
        assert found["from"].endswith(f"step-{max(usable):08d}") if usable else found["from"] == "the beginning"
    assert before == {p: p.read_bytes() for p in sorted(course.rglob("*")) if p.is_file() and "replay" not in p.parts}


def test_it_shows_the_samples_and_the_layers(course):
    _, found = replayed(course, 22)
    losses = {sample["id"]: sample["loss"] for sample in found["samples"]}
    assert len(losses) == 8 and np.mean(list(losses.values())) == pytest.approx(found["loss"], rel=1e-5)
    ordered = [sample["loss"] for sample in found["samples"]]
    assert ordered == sorted(ordered, reverse=True)
    kept = History(course).losses
    for sample, loss in losses.items():
        assert np.nanmin(np.abs(kept[:, sample] - loss)) < 1e-5 * loss
    norms = np.array(list(found["gradients"].values()))
    assert np.sqrt((norms**2).sum()) == pytest.approx(found["grad_norm"], rel=1e-5)
    assert found["not_finite"] == [] and found["problem"] is None
    with Image.open(course / "replay" / "step-00000022" / "worst.png") as picture:
        assert picture.width > 8 * 32


def test_on_two_ranks_it_is_the_same(course):
    _, one = replayed(course, 21)
    ended, two = replayed(course, 21, world=2)
    assert codes(ended) == [0, 0] and two["ranks"] == 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert {s["id"] for s in two["samples"]} == {s["id"] for s in one["samples"]}
    assert two["gradients"] == pytest.approx(one["gradients"], rel=1e-3, abs=1e-7)


def test_a_loss_that_is_not_finite_is_followed_to_its_layer(glyphs, tmp_path):
    folder = tmp_path / "run"
    settings = overrides(folder, glyphs / "train", "engine.name=accelerate", "engine.precision=fp32")
    ended = run(2, "supervised", settings, hurt=partial(overflow, 6))
    assert codes(ended) == [70, 70]
    told = json.loads((folder / "nonfinite.json").read_text())
    assert told["step"] == 6 and "step 6: the loss of rank 0 is" in told["problem"]
    samples = {rank: [s["id"] for s in own] for rank, own in told["samples"].items()}
    assert [len(own) for own in samples.values()] == [4, 4]
    assert "sluice replay" in notes(folder)
    (end,) = start_ranks(1, _overflown, folder=str(folder), step=6)
    assert end.value == 0, end.problem
    found = json.loads((folder / "replay" / "step-00000006" / "replay.json").read_text())
    assert "the loss of rank 0 is" in found["problem"]
    assert found["not_finite"][0] == "encoder.backbone.blocks.1.mlp.fc2"
    assert found["from"].endswith("step-00000003")
    assert {s["id"] for s in found["samples"]} == {*samples["rank 0"], *samples["rank 1"]}


def overflow(step: int) -> None:
    """Let one layer give what is not finite, in one step."""
    from timm.layers import Mlp

    from pipeline.objectives.supervised import Supervised

    forward, now = Supervised.forward, [0]
    inner = Mlp.forward

    def counted(self, batch, ctx):
        now[0] = ctx.clock.step + 1
        self.encoder.backbone.blocks[1].mlp.last = True
        return forward(self, batch, ctx)

    def hurt(self, x):
        if now[0] == step and getattr(self, "last", False):
            self.fc2.register_forward_hook(lambda module, inputs, output: output * float("inf"), prepend=True)
        return inner(self, x)

    Supervised.forward, Mlp.forward = counted, hurt


def _overflown(folder: str, step: int) -> int:
    overflow(step)
    return _replay(["--run", folder, "--step", str(step)])


def test_a_step_that_there_is_not_is_refused(course):
    ended, _ = replayed(course, STEPS + 1)
    assert codes(ended) == [2]
