"""Mean teacher: loss and teacher by hand."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.protocols import Clock
from pipeline.objectives.mean_teacher import Config
from tests.unit.objectives.few_labels import RESNET, at, batch, build, check_common, logits


@pytest.mark.parametrize(("step", "weight"), [(0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0), (70, 1.0)])
def test_mean_teacher_by_hand(step, weight):
    model, data = build("mean_teacher", consistency=20.0), batch(views=2)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = model(data, at(step))
    student = logits(model, data["unlabelled_image"].flatten(0, 1)).softmax(dim=1)
    teacher = model.encoders()["logits"](data["unlabelled_image2"].flatten(0, 1)).softmax(dim=1)
    expected = functional.cross_entropy(logits(model, data["image"]), data["label"])
    expected = expected + 20 * weight * functional.mse_loss(student, teacher)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics["loss_unlabelled"].item() > 1e-4


def test_the_teacher_begins_as_the_student_follows_it_and_gets_no_gradient():
    model = build("mean_teacher", decay=0.9)
    pairs = list(model.averages(Clock(0, 0, 100)))
    assert len(pairs) == len([n for n, _ in model.named_parameters() if not n.startswith("teacher.")])
    assert all(torch.equal(average.target, average.source) for average in pairs)
    keeps = [next(iter(model.averages(Clock(step, 0, 100)))).keep for step in (1, 3, 9, 50)]
    assert keeps == pytest.approx([1 / 2, 3 / 4, 0.9, 0.9])
    model.train()(batch(views=2), at(50)).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    named = {id(p) for p in model.teacher.parameters()}
    assert {id(p) for p in model.encoders()["logits"].parameters()} == named


def test_what_the_teacher_sees_moves_its_batch_norm_and_not_the_students_back():
    model, data = build("mean_teacher", **RESNET).train(), batch(views=2)
    before = copy.deepcopy(model.teacher["encoder"].backbone.bn1.running_mean)
    model(data, at(3))
    own = model.encoder.backbone.bn1
    teacher = model.teacher["encoder"].backbone.bn1
    assert not torch.equal(teacher.running_mean, before)
    assert not torch.equal(teacher.running_mean, own.running_mean) and int(own.num_batches_tracked) == 1


def test_what_all_that_learn_from_few_labels_have_in_common():
    check_common("mean_teacher")


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError, match="less than 1"):
        Config(decay=1.0)
