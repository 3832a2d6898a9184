"""From a run to weights that others load: timm strictly, and a run that fine-tunes them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import timm
import torch

from pipeline.core.protocols import DataFacts
from pipeline.nn.encoder import ImageEncoder
from pipeline.nn.images import Normalize
from pipeline.nn.weights import read
from pipeline.objectives import mae
from pipeline.record.results import read_results
from tests.contracts.components import smoke_config
from tests.integration.runs import codes, overrides, run
from tests.ranks import start_ranks


def export(arguments: list[str]) -> str:
    """One rank, through the program's own entry; what it printed."""
    from pipeline.run.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["export", *arguments]) == 0
    return printed.getvalue().splitlines()[0]


def test_a_run_is_exported_loaded_by_timm_and_fine_tuned(glyphs, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    quick = ["run.length=3ba", "engine.precision=fp32"]
    own = overrides(folder, glyphs / "train", *quick, "engine.name=accelerate")
    assert codes(run(1, "mae", own)) == [0]
    (ended,) = start_ranks(1, export, arguments=["--run", str(folder), "--out", str(out)])
    theirs = eval(ended.value, {"timm": timm}).eval()

    tensors, metadata = read(out / "objective.safetensors")
    assert metadata["step"] == "3" and '"mae"' in metadata["config"]
    settings = mae.Config(**smoke_config("mae").objective.settings)
    model = mae.MAE(settings, DataFacts((32, 32), ())).eval()
    model.load_state_dict(tensors)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mine = ImageEncoder(Normalize(settings.mean, settings.std), theirs, "native")
    torch.testing.assert_close(mine(image), model.encoders()["image"](image))

    resized = ["--image-size", "16", "48", "--patch-size", "4", "8", "--out", str(tmp_path / "small")]
    (ended,) = start_ranks(1, export, arguments=["--run", str(folder), *resized])
    assert eval(ended.value, {"timm": timm}).patch_embed.grid_size == (4, 6)

    weights = f"objective.weights='{out / 'encoder.safetensors'}'"
    tuned = overrides(tmp_path / "tuned", glyphs / "train", *quick, weights)
    assert codes(run(1, "supervised", tuned)) == [0]

    lars = ["optimizer.name=lars", "optimizer.layer_decay=1.0", "objective.freeze=true", "engine.name=accelerate"]
    probe = overrides(tmp_path / "probe", glyphs / "train", *quick, weights, *lars)
    assert codes(run(1, "supervised", probe)) == [0]
    (out / "encoder.safetensors").unlink()  # a probe's checkpoint holds all that evaluating it needs
    (ended,) = start_ranks(1, accuracy, folder=tmp_path / "probe", shards=glyphs)
    assert 0 <= ended.value <= 1


def accuracy(folder: Path, shards: Path) -> float:
    """Of the classifier in a run, as its results say."""
    from pipeline.run.__main__ import main

    suite = folder / "suite.toml"
    suite.write_text(f'workers = 0\nstreams = {{ val = "{shards / "val"}" }}\nevals = [{{ name = "accuracy" }}]\n')
    assert main(["eval", "--run", str(folder), "--suite", str(suite)]) == 0
    return read_results(folder).rows[0].value
