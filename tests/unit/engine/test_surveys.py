"""A survey's course, seen with parts that only note what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.core.protocols import Batch, Clock
from pipeline.engine.meter import Meter
from pipeline.engine.surveys import SECONDS, Surveyor

CPU = torch.device("cpu")
CLOCK = Clock(7, 70, 100)


class Pulse:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def at(self, doing: str, step: int | None = None) -> None:
        self.said.append(doing)


class Samples:
    """Two batches on this rank, and three on another."""

    batches = 3

    def __iter__(self) -> Iterator[Batch]:
        return iter([{"id": torch.tensor([4, 5])}, {"id": torch.tensor([6])}])

    def ledger(self) -> list[dict[str, Any]]:
        return [{"id": 5, "step": 1}]


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looked: list[list[int]] = []
        self.rows: dict[str, list[int]] | None = None
        self.state: tuple[bool, bool, int] | None = None
        self.drawn: list[int] = []
        self.renewed: list[dict[str, int]] = []

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: Any) -> None:
        self.rows = {name: value.tolist() for name, value in rows.items()}
        self.state = (self.training, torch.is_grad_enabled(), ctx.clock.step)
        self.drawn.append(int(torch.randint(10**9, ())))

    def fresh(self, survey: str) -> dict[str, int]:
        assert self.rows is not None, "what begins anew is known when the rows are"
        return {f"head of {survey}": len(self.renewed)}


def surveyor(stop: bool = False) -> tuple[Surveyor, Objective, Pulse]:
    objective, pulse = Objective(), Pulse()

    def look(survey: str, batch: Batch, ctx: Any) -> dict[str, Tensor]:
        assert not objective.training and not ctx.training and not torch.is_grad_enabled()
        objective.looked.append(batch["id"].tolist())
        return {"twice": 2 * batch["id"]}

    place = SimpleNamespace(device=CPU)
    engine = SimpleNamespace(
        objective=objective, place=place, look=look, whole_parameters=nullcontext, renew=objective.renewed.append
    )
    watch = SimpleNamespace(ask=lambda: stop)
    return Surveyor(cast(Any, engine), Meter(CPU, 1, cast(Any, pulse)), cast(Any, watch), seed=3), objective, pulse


def test_all_ranks_look_equally_often_and_each_keeps_its_own_rows_once():
    made, objective, pulse = surveyor()
    made.make("ids", Samples(), CLOCK)
    assert objective.looked == [[4, 5], [6], [6]]
    assert objective.rows == {"twice": [8, 10, 12], "id": [4, 5, 6]}
    assert objective.state == (False, False, 7) and objective.training
    assert made.ledger() == [{"id": 5, "step": 7, "survey": "ids"}] and made.ledger() == []
    assert objective.renewed == [{"head of ids": 0}]
    assert pulse.said == ["survey ids"] * 4, "the watchdog hears of every look, and of what is made of them"


def test_what_is_drawn_in_it_depends_on_seed_and_step_alone():
    made, objective, _ = surveyor()
    for noise in range(2):
        torch.manual_seed(noise)
        made.make("ids", Samples(), CLOCK)
    made.make("ids", Samples(), Clock(8, 80, 100))
    assert objective.drawn[0] == objective.drawn[1] != objective.drawn[2]


def test_one_that_is_stopped_comes_to_nothing():
    made, objective, _ = surveyor(stop=True)
    made.make("ids", Samples(), CLOCK)
    assert objective.looked == [] and objective.rows is None and objective.training and not objective.renewed


def test_it_is_an_action_ahead_of_an_update_whose_time_is_told(lone_group):
    made, objective, _ = surveyor()
    action = made.action("ids", cast(Any, 7), Samples())
    assert action.ahead and not action.at_end and action.due(CLOCK, ending=False)
    assert made.meter._spent == {SECONDS: 0.0}
    action.run(CLOCK)
    assert objective.rows is not None and made.meter._spent[SECONDS] > 0
