"""The recipes of flows: sound, of the published size, and updates and batch as published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_run
from pipeline.core.components import check_run
from pipeline.core.protocols import DataFacts
from pipeline.nn.generative.invertible import InvertibleConv
from pipeline.objectives.flow import Config, Flow

CONFIGS = Path(__file__).parents[2] / "configs"
ADAM = {"name": "adamw", "lr_scaling": "none", "clip": None}
GLOW = ADAM | {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
RECIPES = {
    # openai/glow, README and train.py: 64 images of 32 pixels, 16 of 64, on each of 8 GPUs; a warm-up of 500,000 images
    # of 32 pixels, by how the code counts them 977 updates at any size
    "glow_cifar10": ((3, 32, 512), 512, "977ba", GLOW),
    "glow_imagenet32": ((3, 48, 512), 512, "977ba", GLOW),
    "glow_imagenet64": ((4, 48, 512), 128, "977ba", GLOW),
    # apple/ml-tarflow, README and train.py
    "tarflow_imagenet64": (
        (2, 768, 8, 8, 64), 256, "1ep", ADAM | {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1e-4, "decay": "all"},
    ),
    "flow_glyphs": ((2, 4, 32), 64, "10%", ADAM | {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 50}),
}  # fmt: skip
"""Sizes of the network, global batch, warm-up, optimizer."""


def test_no_recipe_is_left_out():
    found = {p.stem for p in CONFIGS.glob("*/*.toml") if 'name = "flow"' in p.read_text() or "glow_" in p.read_text()}
    assert found - {"flow", "table"} == set(RECIPES)  # the smoke config, and a row of a sweep


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_as_published(recipe):
    sizes, batch, warmup, optimizer = RECIPES[recipe]
    path = CONFIGS / "generative" / f"{recipe}.toml"
    config = load_run(path, [])
    check_run(config, str(path))
    own = Config(**config.objective.settings).network
    assert tuple(v for v in own.model_dump().values() if not isinstance(v, str)) == sizes
    assert config.run.global_batch == batch and str(config.schedule.warmup) == warmup
    found = config.optimizer.model_dump()
    assert {name: found[name] for name in optimizer} == optimizer
    assert config.engine.precision == "fp32"  # as in the authors' code, where bits per dimension are measured


def test_the_transformers_are_of_the_authors_size():
    """Counted by hand from apple/ml-tarflow, transformer_flow.py: layers, patches in and out, positions."""
    config = load_run(CONFIGS / "generative" / "tarflow_imagenet64.toml", [])
    with torch.device("meta"):
        flow = Flow(Config(**config.objective.settings), DataFacts((64, 64), ()))
    layer = 12 * 768**2 + (3 + 1 + 4 + 1) * 768 + 4 * 768
    block = 8 * layer + 1024 * 768 + (12 * 768 + 768) + (768 * 24 + 24)
    assert sum(p.numel() for p in flow.parameters()) == 8 * block == 460_142_784


def test_the_flow_for_cifar10_is_of_the_authors_size():
    """Counted by hand from openai/glow, model.py: of each step actnorm, 1x1 convolution, three convolutions."""
    config = load_run(CONFIGS / "generative" / "glow_cifar10.toml", [])
    build, InvertibleConv.__init__ = InvertibleConv.__init__, _empty
    try:
        with torch.device("meta"):
            flow = Flow(Config(**config.objective.settings), DataFacts((32, 32), ()))
    finally:
        InvertibleConv.__init__ = build
    total, width = 0, 512
    for channels in (12, 24, 48):
        half = channels // 2
        hidden = 9 * (half + 1) * width + 2 * width + width * width + 2 * width
        last = 9 * (width + 1) * channels + 2 * channels
        total += 32 * (2 * channels + hidden + last)
        total += 9 * (half + 1) * channels + 2 * channels if channels < 48 else 9 * 96 + 2 * 96
    mixes = sum(32 * (2 * channels**2 + channels) for channels in (12, 24, 48))
    assert sum(p.numel() for p in flow.parameters()) == total + mixes


def _empty(self: InvertibleConv, channels: int) -> None:
    """Without the decomposition, which there is none of on the device "meta"."""
    torch.nn.Module.__init__(self)
    self.lower, self.upper = (torch.nn.Parameter(torch.empty(channels, channels)) for _ in range(2))
    self.log_diagonal = torch.nn.Parameter(torch.empty(channels))
