"""DeepSpeed's JSON says in words what its versions have had different defaults for."""

import pytest

from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.engine.deepspeed import settings


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipping_is_always_explicit(zero, clip):
    config = RunConfig.model_validate(
        {
            "run": {"folder": "x", "length": "8ba", "global_batch": 16},
            "data": {"train": "x"},
            "objective": {"name": "mae"},
            "optimizer": {"lr": 1e-3, "clip": clip},
            "engine": {"name": "deepspeed", "zero": zero, "micro_batch": 2},
        }
    )
    found = settings(config.engine, config.optimizer, resolve(config, 100, 4))
    # stage 0 in fp32 does not tell the norm, so there the engine clips by itself
    assert found["gradient_clipping"] == (clip if clip and zero else 0.0)
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (16, 2)
