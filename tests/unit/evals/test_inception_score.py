import pytest
import torch
from torch import nn

from pipeline.evals.inception_score import Config, InceptionScore
from tests.unit.evals.generated import CLASSES, encoders, run


class Judge(nn.Module):
    """Logits of the grey that an image has, sharp or not at all."""

    dim = CLASSES

    def __init__(self, sharpness):
        super().__init__()
        self.inner, self.sharpness = encoders()["judge.logits"], sharpness

    def forward(self, image):
        return self.inner(image) * self.sharpness


@pytest.mark.parametrize(("sharpness", "expected"), [(0.0, 1.0), (1e4, CLASSES)])
def test_it_is_one_for_a_constant_classifier_and_the_number_of_classes_for_a_sure_one(sharpness, expected, lone_group):
    """O11."""
    found = run(InceptionScore(Config(samples=40)), encoders() | {"judge.logits": Judge(sharpness)}, {})
    assert found["inception_score/score"].value == pytest.approx(expected, rel=1e-6)
    assert found["inception_score/classes"].value == CLASSES


def test_it_is_the_formula(lone_group):
    judge = Judge(3.0)
    found = run(InceptionScore(Config(samples=12, batch=5)), encoders() | {"judge.logits": judge}, {})
    generator = encoders()["generator"]
    with torch.no_grad():
        x = generator.sample(torch.arange(12), torch.arange(12) % CLASSES, 0)
        p = judge(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)).double().softmax(dim=1)
    score = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert found["inception_score/score"].value == pytest.approx(float(score), rel=1e-6)
