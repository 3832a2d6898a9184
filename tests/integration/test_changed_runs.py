"""A run that goes on with another configuration: what is taken is said and kept, what is not leaves it as it is."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.config import provenance
from pipeline.config.load import load_run
from tests.integration.runs import codes, die_at, metrics, notes, overrides, run
from tests.integration.test_ema import tensors

TINY = ["objective.encoder_args={patch_size = 8, embed_dim = 8, depth = 1, num_heads = 2}", "data.image.size=16"]
LENGTH = 6


def settings(folder: Path, shards: Path, *more: str) -> list[str]:
    return overrides(folder, shards, *TINY, f"run.length={LENGTH}ba", *more)


def weights_file(folder: Path) -> Path:
    """Where the run's encoder begins; given away before the run goes on."""
    return folder.parent / "weights.safetensors"


@pytest.fixture(scope="module")
def killed(glyphs, tmp_path_factory) -> Path:
    """A run that was begun from a file of weights, killed in step 5, with a checkpoint of step 3."""
    from safetensors.torch import save_file

    from pipeline.nn.encoder import EncoderConfig, create_backbone

    folder = tmp_path_factory.mktemp("killed") / "run"
    args = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    backbone = create_backbone(EncoderConfig(encoder="vit_tiny_patch16_224", encoder_args=args), (16, 16))
    save_file(backbone.state_dict(), weights_file(folder))
    more = [f"objective.weights='{weights_file(folder)}'"]
    ended = run(1, "supervised", settings(folder, glyphs / "train", *more), hurt=partial(die_at, 4, rank=0))
    assert codes(ended) == [-9]
    weights_file(folder).unlink()
    return folder


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"


def go_on(left: Path, glyphs: Path, killed: Path, *more: str) -> list[int | None]:
    own = [f"objective.weights='{weights_file(killed)}'", *more]
    return codes(run(1, "supervised", settings(left, glyphs / "train", *own)))


def said(folder: Path) -> str:
    return (folder / "logs" / "rank-00000.log").read_text()


def test_the_file_that_it_began_from_may_be_gone(left, glyphs, killed):
    assert go_on(left, glyphs, killed) == [0]
    (change,) = provenance.read(left)["changes"]
    assert change["settings"].keys() == {"run.folder"}, "nothing else has changed"


def test_what_makes_it_another_experiment_is_refused_and_changes_nothing(left, glyphs, killed):
    names = ("state.json", "provenance.json", "config.toml", "metrics.jsonl")
    before = {name: (left / name).read_bytes() for name in names}
    assert go_on(left, glyphs, killed, "objective.label_smoothing=0.1", "optimizer.lr=1e-2") == [2]
    assert "objective.label_smoothing: 0.0, now 0.1" in said(left) and "run.change" in said(left)
    assert go_on(left, glyphs, killed, "optimizer.name=sgd") == [2]
    assert "optimizer.name: 'adamw', now 'sgd'" in said(left)
    assert go_on(left, glyphs, killed, "run.length=2ba") == [2]
    assert "ends at step 2" in said(left) and "--from-step" in said(left)
    assert {name: (left / name).read_bytes() for name in names} == before


def test_what_may_change_is_said_and_kept_with_its_step(left, glyphs, killed):
    change = ["objective.label_smoothing=0.1", 'run.change=["objective.label_smoothing"]', "run.length=12ba"]
    assert go_on(left, glyphs, killed, *change, "ema.decay=0.9", "every.checkpoint=1ba", "run.keep=99") == [0]
    text = notes(left)
    for word in ("label_smoothing: 0.0, now 0.1", "run.length: '6ba', now '12ba'", "from step 3 on"):
        assert word in text
    rates = {step: line["lr"] for step, line in metrics(left).items()}
    assert f"learning rate goes from {rates[3]:.4g} to {rates[4]:.4g}" in text
    (change,) = provenance.read(left)["changes"]
    assert change["step"] == 3
    assert change["settings"]["objective.label_smoothing"] == {"before": 0.0, "now": 0.1}
    assert load_run(left / "config.toml").objective.settings["label_smoothing"] == 0.1

    assert "average of [ema] begins at step 3" in text
    saved = {step: tensors(left / "checkpoints" / f"step-{step:08d}") for step in range(3, 13)}
    for name in (n for n in saved[12] if n.startswith("ema/")):
        average = saved[3]["model/" + name[4:]].double()
        for step in range(4, 13):  # kept per update: (1 + n) / (10 + n), up to 0.9
            keep = min(0.9, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * saved[step]["model/" + name[4:]].double()
        torch.testing.assert_close(saved[12][name].double(), average, rtol=1e-5, atol=1e-6)


def test_a_power_average_is_of_a_whole_run(left, glyphs, killed):
    assert go_on(left, glyphs, killed, "ema.power=[0.1]") == [2]
    assert "cannot begin in the middle" in said(left)
    assert json.loads((left / "state.json").read_text())["exit_code"] == 2
