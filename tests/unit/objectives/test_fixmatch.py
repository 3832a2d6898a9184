"""FixMatch: loss by hand, and who teaches whom."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.objectives.fixmatch import Config
from tests.unit.objectives.few_labels import at, batch, between, build, check_common, logits


@pytest.mark.parametrize("taught", [1, 4])
def test_fixmatch_by_hand(taught):
    data = batch(views=2)
    threshold = between(build("fixmatch"), data, taught)
    model = build("fixmatch", threshold=threshold, weight=0.7)
    out = model(data, at(5))
    other = {"image2": data["unlabelled_image2"].flatten(0, 1), "id": data["unlabelled_id"].flatten()}
    other["epoch"] = torch.zeros_like(other["id"])
    strong = logits(model, model.strong(other, at(5)))
    weak = logits(model, data["unlabelled_image"].flatten(0, 1)).softmax(dim=1)
    counts = [i for i in range(6) if float(weak[i].max().detach()) >= threshold]
    assert len(counts) == taught
    expected = functional.cross_entropy(logits(model, data["image"]), data["label"])
    expected = expected - 0.7 * sum(strong.log_softmax(dim=1)[i, weak[i].argmax()] for i in counts) / 6
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # The weak view teaches and is not taught: the gradient is that of the sum above with constant labels.
    (own,) = torch.autograd.grad(out.loss, model.head.weight, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected, model.head.weight)
    torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-6)


def test_strong_views_are_stronger_belong_to_the_sample_and_differ_by_epoch():
    model, data = build("fixmatch"), batch(views=2)
    ids = data["unlabelled_id"].flatten()
    other = {"image2": data["unlabelled_image2"].flatten(0, 1), "id": ids, "epoch": torch.zeros_like(ids)}
    strong = model.strong(other, at(0))
    assert strong.dtype == torch.uint8 and not torch.equal(strong, other["image2"])
    one = {name: value[2:3] for name, value in other.items()}
    assert torch.equal(model.strong(one, at(7))[0], strong[2])
    assert not torch.equal(model.strong(other | {"epoch": torch.ones_like(ids)}, at(0)), strong)
    plain = build("fixmatch", cutout=0.0, augment={"probability": 0.0})
    assert torch.equal(plain.strong(other, at(0)), other["image2"])


def test_what_all_that_learn_from_few_labels_have_in_common():
    check_common("fixmatch")


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="images of three channels, not 1"):
        Config(mean=(0.5,), std=(0.5,))
