"""What a line of metrics says of a step, with and without phases."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.digest import batch_digest
from pipeline.core.protocols import Clock, StepOutput
from pipeline.engine.meter import Meter
from pipeline.nn.spread import spread_of
from tests.ranks import start_ranks

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


def test_features_of_the_last_step_are_looked_at_over_all_micro_batches(lone_group):
    features = torch.randn(12, 5, generator=torch.manual_seed(0))
    meter = Meter(CPU, 1)
    for rows in (torch.ones(12, 5), features):  # a step forgets the one before
        meter.begin_step(1)
        for part in rows.split(6):
            meter.add(StepOutput(torch.tensor(1.0), {}, features=part), BATCHES[0])
        meter.end_update("", 0.5, torch.tensor(1.0))
        meter.end_step(12)
    line = meter.line(CLOCK)
    unit = torch.nn.functional.normalize(features.double())
    assert line["features_std"] == pytest.approx(float(unit.std(0, unbiased=False).mean()) * 5**0.5)
    share = torch.linalg.svdvals(features.double())
    share = share / share.sum()
    assert line["features_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-5)


def test_of_a_few_samples_nothing_is_said(lone_group):
    meter = Meter(CPU, 1)
    meter.begin_step(1)
    meter.add(StepOutput(torch.tensor(1.0), {}, features=torch.eye(7)), BATCHES[0])
    meter.end_update("", 0.5, torch.tensor(1.0))
    meter.end_step(7)
    assert "features_std" not in meter.line(CLOCK)


def watched() -> dict[str, float]:
    """Features of 600 samples, shared out over the ranks."""
    from pipeline.dist.group import process_group

    features = torch.randn(600, 5, generator=torch.manual_seed(0))
    with process_group(1.0) as place:
        meter = Meter(CPU, place.world_size)
        meter.begin_step(1)
        rows = features.chunk(place.world_size)[place.rank]
        meter.add(StepOutput(torch.tensor(1.0), {}, features=rows), BATCHES[0])
        meter.end_update("", 0.5, torch.tensor(1.0))
        meter.end_step(600)
        return meter.line(CLOCK)


def test_features_of_all_ranks_are_looked_at_together_and_no_more_than_needed():
    lines = [ended.value for ended in start_ranks(2, watched)]
    assert lines[0]["features_std"] == lines[1]["features_std"]
    features = torch.randn(600, 5, generator=torch.manual_seed(0))
    expected = spread_of(torch.cat([features[:128], features[300:428]]))
    assert lines[0]["features_std"] == pytest.approx(expected.std)
    assert lines[0]["features_rank"] == pytest.approx(expected.rank)
