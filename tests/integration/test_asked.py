"""What ran is what was asked: engines are read back, and the environment changes nothing."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.errors import LaunchError
from pipeline.dist.group import process_group
from pipeline.engine import asked, optimizers
from pipeline.engine.environment import set_aside
from pipeline.run.build import build_engine
from tests.contracts.components import build_objective
from tests.contracts.test_gradients import ENGINES
from tests.integration.runs import SMOKE, codes, metrics, overrides, run
from tests.ranks import start_ranks

GROUPS = 'optimizer.groups=[{prefix="head", lr=3.0, weight_decay=0.0, frozen_until="1ba"}]'


GROUP = [
    ("weight_decay of head.weight: 0.0 is asked for, 0.05 is there", "weight_decay", 0.05),
    ("lr_scale of head.weight: 3.0 is asked for, 1.0 is there", "lr_scale", 1.0),
    ("eps of head.weight: 1e-08 is asked for, 1e-06 is there", "eps", 1e-6),
    ("betas of head.weight: (0.9, 0.95) is asked for, (0.9, 0.999) is there", "betas", (0.9, 0.999)),
    ("frozen of head.weight: (0, 1) is asked for, (0, 0) is there", "frozen", (0, 0)),
]
"""Changes of the optimizer's last group."""
DEEPSPEED = [
    ("accumulation: 4 is asked for, 1 is there", "gradient_accumulation_steps", 1),
    ("precision: bf16 is asked for, fp32 is there", "torch_autocast_enabled", False),
    ("global batch: 8 is asked for, 16 is there", "train_batch_size", 16),
    ("clip: 0.5 is asked for, 0.25 is there", "gradient_clipping", 0.25),
]
"""Changes of its own configuration."""


def said() -> dict[tuple[str, int], list[tuple[str, str]]]:
    """Of each engine: what was expected after each change, and what is said of the engine."""
    found = {}
    with process_group(2.0) as place:
        for name, stage in ENGINES:
            settings = [f"engine.name={name}", *([f"engine.zero={stage}"] if name == "deepspeed" else []), GROUPS]
            settings = [*overrides(Path("x"), Path("x")), *settings, "engine.precision=bf16"]
            config = load_run(SMOKE / "supervised.toml", settings)
            plan, objective = resolve(config, 100, 1), build_objective("supervised").train()
            rules = optimizers.rules(objective, config.optimizer, plan.frozen)
            engine: Any = build_engine(config, objective, plan, place)
            found[name, stage] = lines = []

            def look(expected: str, of: Any = (engine, config, plan, rules), lines: Any = lines) -> None:
                try:
                    asked.hold(of[0].built(), of[0].objective, of[1], of[2], of[3])
                    lines.append((expected, ""))
                except LaunchError as error:
                    lines.append((expected, str(error)))

            look("")
            stepped = engine.built().optimizer
            stepped.__class__ = torch.optim.Adam
            look("optimizer: torch.optim.adamw.AdamW is asked for, torch.optim.adam.Adam is there")
            stepped.__class__ = torch.optim.AdamW
            for expected, key, value in GROUP:
                before, stepped.param_groups[-1][key] = stepped.param_groups[-1][key], value
                look(expected)
                stepped.param_groups[-1][key] = before
            for expected, key, value in DEEPSPEED[: 4 if stage else 3] if name == "deepspeed" else []:
                before = getattr(engine.engine._config, key)
                setattr(engine.engine._config, key, value)
                look(expected)
                setattr(engine.engine._config, key, before)
            if name == "accelerate":
                engine.accelerator.gradient_state.plugin_kwargs["num_steps"] = 7
                look("accumulation: 4 is asked for, 28 is there")
                engine.accelerator.gradient_state.plugin_kwargs["num_steps"] = 1
                engine.objective.head.half()
                look("weights: float32 is asked for, float16, float32 is there")
                engine.objective.head.float()
            look("")
    return found


def test_an_engine_that_is_another_is_refused():
    (ended,) = start_ranks(1, said)
    assert ended.problem is None
    for (name, stage), lines in ended.value.items():
        assert lines[0] == lines[-1] == ("", ""), (name, stage)
        assert len(lines) == 8 + (2 if name == "accelerate" else 4 if stage else 3)
        for expected, message in lines[1:-1]:
            assert expected in message, (name, stage)
            assert ("DeepSpeed 0." if name == "deepspeed" else "Accelerate 1.") in message


def other_accumulation() -> None:
    import deepspeed

    make = deepspeed.initialize

    def initialize(**arguments: Any) -> Any:
        given = arguments.pop("config")
        other = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
        return make(config=given | other, **arguments)

    deepspeed.initialize = initialize


def test_a_run_that_would_be_another_ends_before_its_first_step(glyphs, tmp_path, capfd):
    settings = overrides(tmp_path / "run", glyphs / "train", "engine.precision=fp32")
    assert codes(run(2, "mae", settings, other_accumulation)) == [2, 2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")
    logs = "".join(p.read_text() for p in (tmp_path / "run").rglob("*.log")) + capfd.readouterr().err
    assert "accumulation: 2 is asked for, 1 is there; global batch: 8 is asked for, 4 is there" in logs


HOSTILE = {
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FORK_LAUNCHED": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
}


def with_hostile_environment(said: Path) -> None:
    os.environ.update(HOSTILE)
    sys.stderr = said.open("w", buffering=1)


def test_the_environment_does_not_reach_the_libraries(glyphs, tmp_path):
    quick = ["run.length=3ba", "engine.name=accelerate", "engine.precision=fp32"]
    assert codes(run(1, "mae", overrides(tmp_path / "quiet", glyphs / "train", *quick))) == [0]
    hostile = overrides(tmp_path / "hostile", glyphs / "train", *quick)
    hurt = functools.partial(with_hostile_environment, tmp_path / "said")
    assert codes(run(1, "mae", hostile, hurt)) == [0]
    assert metrics(tmp_path / "hostile") == metrics(tmp_path / "quiet")
    lines = (tmp_path / "said").read_text()
    for name, value in HOSTILE.items():
        assert f"sluice: {name}={value} of the environment is not used: " in lines


@pytest.mark.parametrize(
    "name", ["NCCL_DEBUG", "MASTER_ADDR", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "FORK_LAUNCHED_TOO", "MY_FSDP_X"]
)
def test_what_changes_no_number_stays(name):
    environment = {name: "1"}
    assert set_aside(environment) == [] and environment == {name: "1"}
