"""Pseudo-labels: loss, ramp and turns by hand."""

import pytest
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.protocols import Clock
from pipeline.objectives.pseudo_label import Config
from tests.unit.objectives.few_labels import at, batch, between, build, check_common, logits


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (10, 0.0), (35, 1.5), (60, 3.0), (99, 3.0)])
@pytest.mark.parametrize("taught", [6, 3])
def test_pseudo_labels_by_hand(step, alpha, taught):
    data = batch()
    threshold = between(build("pseudo_label"), data, taught)
    model = build("pseudo_label", threshold=threshold)
    out = model(data, at(step))
    known = logits(model, data["image"])
    other = logits(model, data["unlabelled_image"].flatten(0, 1))
    p = other.softmax(dim=1)
    counts = [i for i in range(6) if float(p[i].max().detach()) >= threshold]
    assert len(counts) == taught
    expected = functional.cross_entropy(known, data["label"])
    expected = expected - alpha * sum(p[i].max().log() for i in counts) / 6
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics["alpha"].item() == pytest.approx(alpha)
    assert out.metrics["confident"].item() == pytest.approx(len(counts) / 6)


def test_pseudo_labels_alternate_from_t1_on():
    model, data = build("pseudo_label", alternate=(3, 1), ramp=(0.2, 0.2), alpha=2.0), batch()
    turns = [model.weights(Clock(step, step, 100)) for step in range(18, 28)]
    assert turns == [(1.0, 0.0)] * 2 + [(0.0, 2.0)] * 3 + [(1.0, 0.0)] + [(0.0, 2.0)] * 3 + [(1.0, 0.0)]
    out = model(data, at(20))
    assert out.loss.item() == pytest.approx(2 * out.metrics["loss_unlabelled"].item(), rel=1e-5)
    out = model(data, at(23))
    assert out.loss.item() == pytest.approx(out.metrics["loss_labelled"].item(), rel=1e-5)


def test_what_all_that_learn_from_few_labels_have_in_common():
    check_common("pseudo_label")


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match=r"goes from 0\.6 down to 0\.1"):
        Config(ramp=(0.6, 0.1))
