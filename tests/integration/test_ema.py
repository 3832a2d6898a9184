"""Averages of the weights: right under every engine, whole in a checkpoint, not disturbed by a kill or a showcase."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import RunConfig
from pipeline.core.errors import CheckpointError
from pipeline.core.protocols import DataFacts
from pipeline.engine.checkpoint import Saved, read_manifest
from pipeline.nn.ema import gamma_of
from pipeline.objectives.ddpm import DDPM, Config
from pipeline.run.weights import load_weights
from tests.integration.runs import codes, die_at, metrics, overrides, run

DECAY, WIDTHS, STEPS = 0.8, (0.05, 0.25), 6
ENGINES = {
    "accelerate": ["engine.name=accelerate", "engine.precision=fp32"],
    **{
        f"zero{stage}": ["engine.name=deepspeed", f"engine.zero={stage}", "engine.precision=fp32"]
        for stage in range(1, 4)
    },
    "zero2 in bf16": ["engine.name=deepspeed", "engine.zero=2", "engine.precision=bf16"],
}


def settings(folder: Path, shards: Path, engine: str, *more: str) -> list[str]:
    own = [
        f"run.length={STEPS}ba",
        "every.checkpoint=1ba",
        "run.keep=100",
        "optimizer.lr=1e-2",
        "schedule.name=constant",  # so that the weights still move in the last update
        f"ema.decay={DECAY}",
        f"ema.power={list(WIDTHS)}",
        "data.image={size=8, crop='resize'}",
        "objective.network={channels=8, multipliers=[1], blocks=1, attention=[]}",
    ]
    return overrides(folder, shards, *ENGINES[engine], *own, *more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together by hand from the pieces in its files."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("rank-*.safetensors"):
        for key, value in load_file(path).items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, []).append((int(start), value))
    return {name: torch.cat([v for _, v in sorted(found, key=lambda p: p[0])]) for name, found in pieces.items()}


def checkpoints(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [tensors(folder / "checkpoints" / f"step-{step:08d}") for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def course(glyphs, tmp_path_factory):
    """Steps of one run under each engine, made when first asked for."""
    made = {}

    def of(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine)
            assert codes(run(2, "ddpm", settings(made[engine], glyphs / "train", engine))) == [0, 0]
        return made[engine]

    return of


@pytest.mark.parametrize("engine", ENGINES)
def test_averages_are_those_of_the_weights_that_were_saved(engine, course):
    """Recomputed in float64 from the weights in the checkpoints, update by update."""
    saved = checkpoints(course(engine))
    names = [n.removeprefix("ema/") for n in saved[0] if n.startswith("ema/")]
    assert set(names) == {n.partition("/")[2].partition("/")[2] for n in saved[0] if n.startswith("optimizer/exp_avg/")}
    for kind in ("ema", *(f"ema-{w}" for w in WIDTHS)):
        average = None
        for step, state in enumerate(saved, start=1):
            keep = min(DECAY, (1 + step) / (10 + step))
            if kind != "ema":
                keep = (1 - 1 / step) ** (gamma_of(float(kind[4:])) + 1)
            live = torch.cat([state[f"model/{n}"] for n in names]).double()
            found = torch.cat([state[f"{kind}/{n}"] for n in names]).double()
            # the average before the first update is of the initial weights, which no checkpoint holds
            average = found if average is None else keep * average + (1 - keep) * live
            torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
            if step == STEPS:
                assert (found - live).abs().max() > 1e-6
        if kind != "ema":
            first = torch.cat([saved[0][f"{kind}/{n}"] for n in names])
            torch.testing.assert_close(first, torch.cat([saved[0][f"model/{n}"] for n in names]))


def test_neither_a_kill_nor_showcases_nor_another_world_disturb_them(course, glyphs, tmp_path):
    """Under the engine that cuts parameters smallest, and on with the one that does not cut them at all."""
    here, elsewhere, engine, later = tmp_path / "here", tmp_path / "elsewhere", "zero3", "accelerate"
    often = settings(here, glyphs / "train", engine, "every.showcase=2ba", "objective.sampler.steps=2")
    assert codes(run(2, "ddpm", often, hurt=partial(die_at, 4)))[1] == -9
    shutil.copytree(here, elsewhere)
    assert codes(run(2, "ddpm", often)) == [0, 0]
    whole = course(engine)
    assert metrics(here) == metrics(whole)
    expected = checkpoints(whole)[-1]
    for name, value in checkpoints(here)[-1].items():
        assert torch.equal(value, expected.pop(name)), name
    assert not expected

    assert codes(run(1, "ddpm", settings(elsewhere, glyphs / "train", later))) == [0]
    found, expected = checkpoints(elsewhere)[-1], checkpoints(whole)[-1]
    for name in (n for n in expected if n.startswith("ema")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)


def built(saved: Saved) -> DDPM:
    config = RunConfig.model_validate(saved.state["config"])
    return DDPM(Config(**config.objective.settings), DataFacts((8, 8), tuple(saved.state["facts"]["classes"])))


def test_weights_to_evaluate_are_chosen_by_name_or_width(course):
    saved = read_manifest(course("zero1") / "checkpoints" / f"step-{STEPS:08d}")
    by_hand = tensors(saved.folder)

    def loaded(weights: str | float) -> torch.Tensor:
        objective = built(saved)
        load_weights(objective, saved, 0, weights)
        return objective.denoiser.network.conv_in.weight.detach().flatten()

    name = "denoiser.network.conv_in.weight"
    assert torch.equal(loaded("model"), by_hand[f"model/{name}"])
    assert torch.equal(loaded("ema"), by_hand[f"ema/{name}"])
    torch.testing.assert_close(loaded(0.05), by_hand[f"ema-0.05/{name}"], rtol=1e-4, atol=1e-5)
    between, low, high = loaded(0.12), by_hand[f"ema-0.05/{name}"], by_hand[f"ema-0.25/{name}"]
    assert (between - low).norm() < (high - low).norm() and (between - high).norm() < (high - low).norm()


def test_weights_that_are_not_there_are_named(course):
    whole = read_manifest(course("zero1") / "checkpoints" / f"step-{STEPS:08d}")
    plain = replace(whole, tensors={n: spec for n, spec in whole.tensors.items() if not n.startswith("ema")})
    for weights, message in (("ema", "holds no weights 'ema', only model"), (0.1, "train with ema.power")):
        with pytest.raises(CheckpointError, match=message):
            load_weights(built(whole), plain, 0, weights)


def test_a_series_without_optimizers_gives_the_same_average(course, glyphs, tmp_path):
    """What a series keeps is all that an average needs."""
    series, full = ["run.keep=1", "run.keep_every=1ba"], tmp_path / "thin"
    assert codes(run(2, "ddpm", settings(full, glyphs / "train", "zero1", *series))) == [0, 0]
    folders = [full / "checkpoints" / f"step-{step:08d}" for step in range(1, STEPS + 1)]
    held = [{name.partition("/")[0] for name in read_manifest(folder).tensors} for folder in folders]
    averages = {"model", "ema", *(f"ema-{width}" for width in WIDTHS)}
    assert held == [averages] * (STEPS - 1) + [averages | {"optimizer"}]
    assert all(tensors(folder).keys() == read_manifest(folder).tensors.keys() for folder in folders[:-1])

    def average(folder: Path) -> torch.Tensor:
        saved = read_manifest(folder / "checkpoints" / f"step-{STEPS:08d}")
        objective = built(saved)
        load_weights(objective, saved, 0, 0.12)
        return objective.denoiser.network.conv_in.weight.detach()

    assert torch.equal(average(full), average(course("zero1")))
