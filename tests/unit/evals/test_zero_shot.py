"""Zero-shot classification against counting by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.core.evaluation import Table
from pipeline.evals.zero_shot import Config, ZeroShot
from tests.contracts.components import context, numbers
from tests.unit.evals.test_retrieval import CLASSES, N, cosine, encoders, stream


def test_the_nearest_name_is_the_one_counted_by_hand(lone_group):
    towers, label = encoders(), stream().label.tolist()
    image, text = towers["image"].rows.detach(), towers["text"].rows.detach()
    near = [[cosine(i, t) for t in text] for i in image]
    right = [max(range(CLASSES), key=row.__getitem__) == own for row, own in zip(near, label, strict=True)]
    per_class = [[r for r, own in zip(right, label, strict=True) if own == c] for c in range(CLASSES)]
    evaluation, ctx = ZeroShot(Config(templates=("a {}", "the {}."))), context(towers, {"val": stream()})
    values = {r.name: (r.value, r.n) for r in numbers(evaluation, ctx).values()}
    assert values == {
        "zero_shot/top1": (pytest.approx(sum(right) / N), N),
        "zero_shot/top5": (1.0, N),
        "zero_shot/mean_class_recall": (pytest.approx(sum(sum(c) / len(c) for c in per_class) / CLASSES), N),
    }
    assert 0.05 < values["zero_shot/top1"][0] < 0.6
    with torch.no_grad():
        (table,) = [output for output in evaluation.run(ctx) if isinstance(output, Table)]
    expected = [(f"class {c}", len(own), pytest.approx(sum(own) / len(own))) for c, own in enumerate(per_class)]
    assert list(table.rows) == expected and table.columns == ("class", "images", "recall")


class Templates(torch.nn.Module):
    """A vector that depends on the sentence and not on the name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 3.0], [-2.0, 2.0]]))

    def forward(self, text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.rows[text[:, 0]]


def test_sentences_of_a_class_are_averaged_as_unit_vectors(lone_group):
    def read(texts):
        assert texts == ["a x", "x!", "a y", "y!"]
        return {"text": torch.arange(4)[:, None], "text_length": torch.ones(4, dtype=torch.int64)}

    ctx = replace(context({"text": Templates()}, {}), tokenize=read)
    with torch.no_grad():
        found = ZeroShot(Config(templates=("a {}", "{}!"))).class_vectors(ctx, ("x", "y"))
    half = 0.5**0.5
    second = torch.tensor([0.8 - half, 0.6 + half])
    torch.testing.assert_close(found, torch.stack([torch.tensor([half, half]), second / second.norm()]))


def test_a_template_needs_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        Config(templates=("a photo",))
