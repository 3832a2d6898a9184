"""Zero-shot classification against counting by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.evals.zero_shot import Config, ZeroShot
from tests.unit.evals.test_retrieval import CLASSES, N, cosine, encoders, stream


def test_the_nearest_name_is_the_one_counted_by_hand(lone_group):
    towers, label = encoders(), stream().label.tolist()
    image, text = towers["image"].rows.detach(), towers["text"].rows.detach()
    near = [[cosine(i, t) for t in text] for i in image]
    right = [max(range(CLASSES), key=row.__getitem__) == own for row, own in zip(near, label, strict=True)]
    per_class = [[r for r, own in zip(right, label, strict=True) if own == c] for c in range(CLASSES)]
    with torch.no_grad():
        found = ZeroShot(Config(templates=("a {}", "the {}."))).run(towers, {"val": stream()})
        values = {r.name: (r.value, r.n) for r in found}
    assert values == {
        "zero_shot/top1": (pytest.approx(sum(right) / N), N),
        "zero_shot/top5": (1.0, N),
        "zero_shot/mean_class_recall": (pytest.approx(sum(sum(c) / len(c) for c in per_class) / CLASSES), N),
    }
    assert 0.05 < values["zero_shot/top1"][0] < 0.6


class Templates(torch.nn.Module):
    """A vector that depends on the sentence and not on the name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 3.0], [-2.0, 2.0]]))

    def forward(self, text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.rows[text[:, 0]]


def test_sentences_of_a_class_are_averaged_as_unit_vectors():
    class Sentences:
        classes = ("x", "y")

        def tokens(self, texts):
            assert texts == ["a x", "x!", "a y", "y!"]
            return {"text": torch.arange(4)[:, None], "text_length": torch.ones(4, dtype=torch.int64)}

    with torch.no_grad():
        found = ZeroShot(Config(templates=("a {}", "{}!"))).class_vectors(Templates(), Sentences())
    half = 0.5**0.5
    second = torch.tensor([0.8 - half, 0.6 + half])
    torch.testing.assert_close(found, torch.stack([torch.tensor([half, half]), second / second.norm()]))


def test_a_template_needs_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        Config(templates=("a photo",))
