"""What a line of metrics says of a step, with and without phases."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.digest import batch_digest
from pipeline.core.protocols import Clock, StepOutput
from pipeline.engine.meter import Meter

CPU = torch.device("cpu")
BATCHES = [{"id": torch.tensor([n]), "epoch": torch.tensor([0]), "image": torch.full((1, 2), n)} for n in (3, 8)]
CLOCK = Clock(1, 4, 8)


def update(meter: Meter, phase: str, losses: tuple[float, float], rate: float, norm: float) -> None:
    for loss, batch in zip(losses, BATCHES, strict=True):
        meter.add(StepOutput(torch.tensor(loss), {"twice": torch.tensor(2 * loss)}), batch)
    meter.end_update(phase, rate, torch.tensor(norm))


def test_without_phases(lone_group):
    meter = Meter(CPU, 1)
    for _ in range(2):  # a step forgets the one before
        meter.begin_step(1)
        update(meter, "", (1.0, 3.0), 0.5, 4.0)
        meter.end_step(4)
    line = meter.line(CLOCK)
    assert list(line)[:6] == ["step", "samples", "loss", "twice", "lr", "grad_norm"]
    assert [line[name] for name in ("loss", "twice", "lr", "grad_norm")] == [2.0, 4.0, 0.5, 4.0]
    assert float(meter.loss) == 2.0 and float(meter.norm) == 4.0
    assert line["data_digest"] == f"{sum(int(batch_digest(batch)) for batch in BATCHES) % 2**64:016x}"
    assert "survey_seconds" not in line


def test_with_phases_each_has_its_names_and_its_last_update_counts(lone_group):
    meter = Meter(CPU, 1)
    for _ in range(2):
        meter.begin_step(1)
        update(meter, "maker", (1.0, 3.0), 0.5, 3.0)
        update(meter, "critic", (7.0, 9.0), 0.25, 2.0)
        update(meter, "critic", (5.0, 5.0), 0.25, 4.0)
        meter.end_step(4)
    line = meter.line(CLOCK)
    assert {name: value for name, value in line.items() if "/" in name} == {
        "maker/loss": 2.0,
        "maker/twice": 4.0,
        "maker/lr": 0.5,
        "maker/grad_norm": 3.0,
        "critic/loss": 5.0,
        "critic/twice": 10.0,
        "critic/lr": 0.25,
        "critic/grad_norm": 4.0,
    }
    assert line["loss"] == 7.0
    assert float(meter.loss) == 2.0 + 8.0 + 5.0, "of all updates, so that none that is not finite is missed"
    assert float(meter.norm) == pytest.approx((3.0**2 + 2.0**2 + 4.0**2) ** 0.5)
    digest = sum(int(batch_digest(batch)) for batch in BATCHES) % 2**64
    assert line["data_digest"] == f"{digest:016x}", "a batch counts once, whoever sees it"


def test_time_spent_on_no_step_is_told_and_is_not_the_steps(lone_group):
    meter = Meter(CPU, 1)
    meter.spend("survey_seconds", 1000.0)
    meter.spend("survey_seconds", 500.0)
    for seconds in (1500.0, 0.0):
        meter.begin_step(1)
        update(meter, "", (1.0, 1.0), 0.5, 1.0)
        meter.end_step(4)
        line = meter.line(CLOCK)
        assert line["survey_seconds"] == seconds
        assert -1500 <= line["step_seconds"] < 100 and (line["step_seconds"] < 0) == (seconds > 0)
