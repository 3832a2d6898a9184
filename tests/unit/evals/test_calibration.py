import math

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.evals.calibration import Calibration, Config, calibration_error, temperature
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


def made(n, seed, sharper=1.0, classes=4):
    """Logits that are right about their own uncertainty, then made sharper: labels are drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * 1.5
    label = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits * sharper, label


def stream(logits, label, name):
    made = ListStream(logits, label)
    made.classes, made.fingerprint = tuple("abcd"), name
    return made


def measured(streams, **settings):
    return numbers(Calibration(Config(**settings)), context({"logits": Identity()}, streams))


def by_hand(logits, label, bins):
    """One sample at a time, bins (i/B, (i+1)/B]."""
    sums = {}
    brier = nll = 0.0
    for row, truth in zip(logits.double().tolist(), label.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        best = max(range(len(p)), key=p.__getitem__)
        place = min(b for b in range(bins) if p[best] <= (b + 1) / bins)
        count, right, sure = sums.get(place, (0, 0, 0.0))
        sums[place] = (count + 1, right + (best == truth), sure + p[best])
        brier += sum((q - (i == truth)) ** 2 for i, q in enumerate(p))
        nll -= math.log(p[truth])
    n = len(label)
    return (
        sum(count / n * abs(right / count - sure / count) for count, right, sure in sums.values()),
        brier / n,
        nll / n,
    )


@pytest.mark.parametrize("bins", [1, 15])
def test_equals_one_sample_at_a_time(lone_group, bins):
    logits, label = made(60, 0, sharper=3.0)
    found = measured({"val": stream(logits, label, "val")}, bins=bins)
    assert list(found) == ["calibration/ece", "calibration/brier", "calibration/nll"]
    for result, expected in zip(found.values(), by_hand(logits, label, bins), strict=True):
        assert result.value == pytest.approx(expected, rel=1e-6) and result.n == 60 and result.better == "lower"


def test_each_sample_brings_its_own(lone_group):
    logits, label = made(20, 1)
    found = measured({"val": stream(logits, label, "val")})
    assert found["calibration/ece"].samples is None
    for i in range(20):
        _, brier, nll = by_hand(logits[i : i + 1], label[i : i + 1], 1)
        assert found["calibration/brier"].samples[i] == pytest.approx(brier, rel=1e-5)
        assert found["calibration/nll"].samples[i] == pytest.approx(nll, rel=1e-5)


def test_certain_and_right_is_no_error_and_certain_and_wrong_is_all():
    p = torch.eye(3, dtype=torch.float64)
    assert calibration_error(p, torch.tensor([0, 1, 2]), 15) == 0
    assert calibration_error(p, torch.tensor([1, 2, 0]), 15) == 1


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]], dtype=torch.float64)
    # in bins of a half: one wrong at 0.5, one right at 0.75; in one bin they would make up for each other
    assert calibration_error(p, torch.tensor([1, 0]), 2) == (0.5 + 0.25) / 2


def test_the_temperature_is_what_the_logits_were_multiplied_by(lone_group):
    logits, label = made(20_000, 1, sharper=2.5)
    assert temperature(logits.double(), label) == pytest.approx(2.5, rel=0.05)
    streams = {"val": stream(*made(5_000, 2, sharper=2.5), "val"), "held": stream(logits, label, "held")}
    found = measured(streams, fit="held")
    assert found["calibration/temperature"].split == "held" and found["calibration/temperature"].better is None
    assert found["calibration/ece"].value > 0.1 > 0.03 > found["calibration/ece_scaled"].value
    assert found["calibration/nll_scaled"].value < found["calibration/nll"].value
    assert found["calibration/brier_scaled"].value < found["calibration/brier"].value


def test_a_temperature_is_not_fitted_on_what_is_measured(lone_group):
    data = stream(*made(50, 0), "the same")
    with pytest.raises(ConfigError, match=r"calibration\.fit: stream 'held' is the data that is measured on"):
        measured({"val": data, "held": data}, fit="held")
