"""Adversarial adaptation that is killed in the middle resumes bit for bit: critic, both encoders, shares of classes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pipeline.config.load import load_run
from pipeline.core.protocols import DataFacts
from pipeline.objectives.supervised import Config, Supervised
from tests.integration.runs import SMOKE, codes, die_at, metrics, notes, overrides, run

CRITIC = {"adapt_dann": "critic_accuracy", "adapt_adda": "critic/critic_accuracy"}
"""What tells of it in the metrics."""


def first_stage(file: Path, shards: Path) -> None:
    """An export of an untrained classifier, with the encoder of ADDA's smoke configuration."""
    given = load_run(SMOKE / "adapt_adda.toml", []).objective.settings
    facts = DataFacts((32, 32), tuple(json.loads((shards / "manifest.json").read_text())["classes"]))
    settings = {name: given[name] for name in ("encoder", "encoder_args")}
    config = {"objective": {"name": "supervised", **settings}}
    about = {"config": json.dumps(config), "facts": json.dumps(facts.plain())}
    save_file(Supervised(Config(**settings), facts).state_dict(), file, about)


@pytest.mark.parametrize("objective", [pytest.param("adapt_dann", marks=pytest.mark.slow), "adapt_adda"])
def test_killed_between_critic_and_encoder_it_goes_on_as_if_nothing_had_happened(objective, glyphs, tmp_path):
    """It dies at step 8; step 6 was saved, and DANN's shares of classes were found at step 4, before that."""
    more = [f"data.beside.target.path='{glyphs / 'val'}'", "optimizer.lr=1e-2", "optimizer.betas=[0.9,0.9]"]
    if objective == "adapt_adda":
        first_stage(tmp_path / "stage.safetensors", glyphs / "train")
        more.append(f"objective.source='{tmp_path / 'stage.safetensors'}'")

    def own(folder: Path) -> list[str]:
        return overrides(folder, glyphs / "train", *more)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert codes(run(1, objective, own(whole))) == [0]
    assert codes(run(1, objective, own(killed), partial(die_at, 8, 0))) == [-9]
    assert codes(run(1, objective, own(killed))) == [0]
    assert "step-00000006 at step 6" in notes(killed)
    assert metrics(killed) == metrics(whole)
    assert len({line[CRITIC[objective]] for line in metrics(whole).values()}) > 2
    files = [folder / "checkpoints" / "step-00000012" / "rank-00000.safetensors" for folder in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
