"""What each engine and stage holds and sends, against sums done by hand for a model of a few tensors."""

from __future__ import annotations

import pytest

from pipeline.config.schema import EmaConfig, EngineConfig, Optimizer
from pipeline.engine.footprint import Sizes, checkpoint_bytes, gathered, held, sent

SIZES = Sizes(trained=[300_000, 600], frozen=[200_000, 90], rebuilt=0, buffers=40, halved=300_000)
TRAINED = 1_202_400
"""Bytes of 300,600 elements; a quarter is 300,600."""
FROZEN = 800_360
ADAMW, LARS = Optimizer(lr=1.0), Optimizer(name="lars", lr=1.0)
EMA = EmaConfig(power=(0.05, 0.1))
EMA_COPIES = 3


def engine(kind: int | str, precision: str = "fp32") -> EngineConfig:
    name = {"name": "accelerate"} if kind == "accelerate" else {"name": "deepspeed", "zero": kind}
    return EngineConfig.model_validate(name | {"precision": precision, "micro_batch": 1})


@pytest.mark.parametrize(
    ("kind", "weights", "part", "master"),
    [
        ("accelerate", TRAINED + FROZEN + 40, TRAINED, 0),
        (0, TRAINED + FROZEN + 40, TRAINED, 0),
        (1, TRAINED + FROZEN + 40, 300_600, 300_600),
        (2, TRAINED + FROZEN + 40, 300_600, 300_600),
        (3, 300_600 + 200_090 + 4 * (600 + 90) + 40, 300_600, 300_600),  # small tensors are whole everywhere
    ],
)
def test_memory_on_each_of_four_ranks(kind, weights, part, master):
    found = held(SIZES, engine(kind), ADAMW, EMA, world_size=4)
    assert (found.weights, found.gradients, found.master) == (weights, part, master)
    assert (found.optimizer, found.ema) == (2 * part, EMA_COPIES * part)
    assert found.total == weights + part + master + 2 * part + EMA_COPIES * part
    assert held(SIZES, engine(kind), ADAMW, None, world_size=4).ema == 0


def test_what_does_not_divide_is_rounded_up():
    assert held(SIZES, engine(1), ADAMW, None, world_size=7).gradients == 171_772  # 171,771.4


def test_what_is_gathered_is_all_that_is_not_whole_but_never_more_than_a_thousand_million():
    assert [gathered(SIZES, engine(kind)) for kind in ("accelerate", 0, 1, 2)] == [0, 0, 0, 0]
    assert gathered(SIZES, engine(3)) == 4 * 500_000
    assert gathered(Sizes([3 * 10**9], [], 0, 0, 0), engine(3)) == 4 * 10**9


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (ADAMW, 3),
        (LARS, 2),
        (Optimizer(name="sgd", lr=1.0, momentum=0.9), 2),
        (Optimizer(name="sgd", lr=1.0, momentum=0.0), 1),
    ],
)
def test_a_checkpoint_has_every_tensor_once(optimizer, copies):
    assert checkpoint_bytes(SIZES, optimizer, None) == copies * TRAINED + FROZEN + 40
    assert checkpoint_bytes(SIZES, optimizer, EMA) == (copies + EMA_COPIES) * TRAINED + FROZEN + 40


@pytest.mark.parametrize(
    ("kind", "precision", "accumulation", "ring_passes"),
    [
        # A reduction for all is two passes over the ring; one to the owner is counted the same by DeepSpeed, which
        # reduces for all and keeps a part. The updated weights are gathered in one.
        ("accelerate", "bf16", 3, 2 * TRAINED),
        (0, "fp32", 3, 2 * TRAINED),
        (1, "fp32", 3, 2 * TRAINED + TRAINED),
        (1, "bf16", 3, 2 * (TRAINED - 600_000) + TRAINED),  # two bytes less for each of 300,000
        (2, "fp32", 3, 3 * 2 * TRAINED + TRAINED),  # every micro-batch is reduced
        (2, "bf16", 1, 2 * (TRAINED - 600_000) + TRAINED),
    ],
)
def test_bytes_on_the_wire(kind, precision, accumulation, ring_passes):
    assert sent(SIZES, engine(kind, precision), accumulation, world_size=4) == ring_passes * 3 / 4
    assert sent(SIZES, engine(kind, precision), accumulation, world_size=1) == 0


def test_under_zero_3_the_wire_is_not_estimated():
    assert sent(SIZES, engine(3), 1, world_size=4) is None
