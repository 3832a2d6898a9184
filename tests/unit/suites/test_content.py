"""The mark of an encoder: the same in every process, another for whatever could give other features."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.core import registry
from pipeline.suites.content import Unknown, code_mark, encoder_mark
from tests.contracts.components import build_objective, names
from tests.ranks import start_ranks


class Holding(nn.Module):
    """Whatever it is given, beside a weight."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.held = held


class Plain:
    def __init__(self, value: object) -> None:
        self.value = value


def first(x: int, y: int = 1) -> int:
    return x + y


def adding(n: int):
    def add(x: int) -> int:
        return x + n

    return add


DIFFERENT = [
    None, 1, 1.0, "1", (1, 2), [1, 2], {"a": 1}, {"a": 2}, {"b": 1}, {1, 2}, {1, 3}, torch.float32, torch.bfloat16,
    torch.zeros(2), torch.ones(2), torch.ones(2, 1), first, adding(1), adding(2), partial(first, 1), partial(first, 2),
    partial(first, y=2), Plain(1), Plain(2), Plain([Plain(3)]), Plain, nn.ReLU(), nn.GELU(), nn.LayerNorm, torch.relu,
]  # fmt: skip


def test_everything_that_is_held_counts():
    marks = [encoder_mark(Holding(held)) for held in DIFFERENT]
    assert len(set(marks)) == len(DIFFERENT)
    assert marks == [encoder_mark(Holding(held)) for held in DIFFERENT]


def test_a_buffer_that_is_not_saved_counts():
    marks = set()
    for mean in (0.4, 0.5):
        module = Holding(None)
        module.register_buffer("mean", torch.tensor(mean), persistent=False)
        marks.add(encoder_mark(module))
    assert len(marks) == 2


def test_what_refers_to_itself_has_a_mark_and_what_nobody_can_describe_has_none():
    held = Plain(None)
    held.value = held
    assert encoder_mark(Holding(held)) != encoder_mark(Holding(Plain(None)))
    with pytest.raises(Unknown, match="lock"):
        encoder_mark(Holding(threading.Lock()))


def marks() -> dict[str, str]:
    found = {"code": code_mark()} | {str(n): encoder_mark(Holding(held)) for n, held in enumerate(DIFFERENT)}
    for name in names():
        for kind, encoder in build_objective(name).encoders().items():
            found[f"{name} {kind}"] = encoder_mark(encoder)
    return found


def test_every_encoder_of_every_objective_has_the_same_mark_in_another_process():
    own = marks()
    assert set(registry.names("pipeline.objectives")) <= {key.split()[0] for key in own} | {"supervised"}
    (other,) = start_ranks(1, marks)
    assert other.problem is None and other.value == own
