import math

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.evals.inception_score import Config, InceptionScore, _score
from tests.unit.evals.generated import CLASSES, encoders, generator, real, run

SAMPLER = generator().settings({})


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
    result = found["inception_score/score"]
    assert result.value == pytest.approx(float(score), rel=1e-6)
    assert run(InceptionScore(Config(samples=12)), encoders() | {"judge.logits": judge}, {}).keys() == found.keys()


def test_splits_are_those_of_torch_fidelity(lone_group):
    judge = Judge(3.0)
    known = encoders() | {"judge.logits": judge}
    found = run(InceptionScore(Config(samples=23, splits=4)), known, {})["inception_score/score"]
    with torch.no_grad():
        image = encoders()["generator"].make(torch.arange(23), {"label": torch.arange(23) % CLASSES}, 0, SAMPLER)
        p = judge(image).double().softmax(dim=1)[np.random.RandomState(2020).permutation(23)]
    parts = [p[i * 23 // 4 : (i + 1) * 23 // 4] for i in range(4)]
    scores = [math.exp(sum(float(r @ (r / q.mean(dim=0)).log()) for r in q) / len(q)) for q in parts]
    assert found.value == pytest.approx(np.mean(scores), rel=1e-6)
    assert found.stderr == pytest.approx(np.std(scores) / 2, rel=1e-5)
    with pytest.raises(ConfigError, match=r"splits = 9: there are only 5 samples"):
        run(InceptionScore(Config(samples=5, splits=9)), known, {})


def test_the_standard_error_is_what_repetition_shows():
    """Over draws of logits, the spread of the score beside what the formula says of each."""
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(300):
        value, *_, error = _score(3 * torch.randn(200, 6, generator=generator), 1, "made")
        values.append(value)
        errors.append(error)
    assert 0.85 < np.mean(errors) / np.std(values) < 1.15


def test_real_images_give_the_scale(lone_group):
    known, own = encoders() | {"judge.logits": Judge(3.0)}, Config(samples=30, reference="train", splits=2)
    found = run(InceptionScore(own), known, {"train": real(60)})
    one, other = found["inception_score/score"], found["inception_score/score_real"]
    assert other.n == 60 and other.split == "train" and other.better is None
    assert one.value == pytest.approx(other.value, abs=0.3)
    with pytest.raises(ConfigError, match=r"splits = 2: there are only 1 images in stream 'train'"):
        run(InceptionScore(own), known, {"train": real(1)})
