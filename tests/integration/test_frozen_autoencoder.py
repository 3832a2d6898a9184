"""An autoencoder that a model is trained on goes with it: only the run that begins, or goes on, needs its file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.protocols import DataFacts
from pipeline.nn.weights import FACTS, save
from pipeline.objectives import vae
from pipeline.record.results import read_results
from tests.integration.runs import codes, die_at, metrics, overrides, run, same_course
from tests.ranks import start_ranks

NETWORK = {"channels": 4, "multipliers": [1, 2], "blocks": 1, "groups": 2, "latent": 2}
PLAIN = "channels=4, multipliers=[1,2], blocks=1, groups=2, latent=2"


@pytest.fixture
def weights(tmp_path) -> Path:
    """As ``sluice export`` writes them."""
    torch.manual_seed(5)
    model = vae.VAE(vae.Config(network=NETWORK), DataFacts((16, 16), ()))
    path = tmp_path / "vae.safetensors"
    save(
        path,
        model.state_dict(),
        {"config": json.dumps({"objective": {"name": "vae", "network": NETWORK}}), FACTS: "{}"},
    )
    return path


def settings(folder: Path, shards: Path, weights: Path, *more: str) -> list[str]:
    return overrides(
        folder,
        shards,
        "run.length=6ba",
        "engine={name='accelerate', precision='fp32', micro_batch=2}",
        f"objective.latent={{kind='vae', weights='{weights}', network={{{PLAIN}}}}}",
        "objective.variance='large'",
        *more,
    )


def finish(run_folder: str, out: str, suite: str) -> None:
    from pipeline.run.export import export
    from pipeline.suites.evaluate import evaluate

    assert export(run_folder, None, out) == 0
    assert evaluate([run_folder], suite) == 0


@pytest.mark.slow
def test_it_is_in_checkpoints_and_exports_and_the_scale_is_measured_once(glyphs, tmp_path, weights):
    shards, whole, killed = glyphs / "train", tmp_path / "whole", tmp_path / "killed"
    assert codes(run(1, "ddpm", settings(whole, shards, weights, "engine.micro_batch=4"))) == [0]
    assert codes(run(2, "ddpm", settings(killed, shards, weights), partial(die_at, 4)))[1] == -9
    assert codes(run(1, "ddpm", settings(killed, shards, weights))) == [0]
    same_course(killed, whole)
    assert metrics(whole).keys() == set(range(1, 7))
    saved = json.loads((whole / "checkpoints" / "step-00000006" / "checkpoint.json").read_text())
    assert "model/space.scale" in saved["tensors"] and "space.autoencoder" in saved["state"]["frozen"]
    weights.unlink()
    suite = tmp_path / "suite.toml"
    streams = f"streams = {{train = '{shards}', val = '{glyphs / 'val'}'}}"
    suite.write_text(
        f"{streams}\nworkers = 0\nevals = [{{name = 'knn', k = [5]}}, {{name = 'samples', samples = 6}}]\n"
    )
    (end,) = start_ranks(1, finish, run_folder=str(whole), out=str(tmp_path / "out"), suite=str(suite))
    assert end.problem is None, end.problem
    exported = load_file(tmp_path / "out" / "objective.safetensors")
    torch.manual_seed(5)
    own = vae.VAE(vae.Config(network=NETWORK), DataFacts((16, 16), ())).state_dict()
    for name, value in own.items():
        assert torch.equal(exported[f"space.autoencoder.{name}"], value), name
    assert 0.1 < float(exported["space.scale"]) < 100 and float(exported["space.scale"]) != 1
    assert any(row.metric.startswith("knn/top1") for row in read_results(whole).rows)
