"""Ramps and cutout of learning from few labels."""

import math

import pytest
import torch

from pipeline.core.random import SampleRandom
from pipeline.nn.few_labels import confident, cut_out, linear_ramp, sigmoid_ramp, spread


def test_ramps_at_their_ends_and_between():
    ends = [linear_ramp(p, 0.1, 0.6) for p in (0.0, 0.0999, 0.1, 0.35, 0.6, 1.0)]
    assert ends == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert [linear_ramp(p, 0.3, 0.3) for p in (0.29, 0.3, 0.5)] == [0, 1, 1]
    rising = [sigmoid_ramp(p, 0.4) for p in (0.0, 0.2, 0.4, 0.9)]
    assert rising == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert sigmoid_ramp(0.0, 0.0) == 1


def test_cutout_fills_one_rectangle_of_the_images_shape_and_nothing_else():
    ids = torch.arange(200)
    x = torch.rand(200, 3, 16, 32) + 1
    fill = torch.tensor([0.0, 0.25, 0.5])
    found = cut_out(x, SampleRandom(1, "c", torch.zeros_like(ids), ids), 0.5, fill)
    changed = (found != x).all(dim=1)
    assert torch.equal(changed, (found != x).any(dim=1))
    assert torch.equal(found.movedim(1, -1)[changed], fill.expand(int(changed.sum()), 3))
    high, wide = changed.any(dim=2).sum(dim=1), changed.any(dim=1).sum(dim=1)
    assert torch.equal(changed.sum(dim=(1, 2)), high * wide)
    assert high.max() <= 8 and wide.max() <= 16 and high.max() > 6 and wide.max() > 12
    # Sides are drawn evenly from 0 to a half, and cut at the edges: most of the area stays.
    assert 0.03 < changed.float().mean() < 0.1
    again = cut_out(x[7:9], SampleRandom(1, "c", torch.zeros(2, dtype=torch.int64), ids[7:9]), 0.5, fill)
    assert torch.equal(again, found[7:9])


def test_what_is_sure_enough_and_whose_it_is():
    logits = torch.tensor([[3.0, 0.0], [0.2, 0.0], [0.0, 5.0]], requires_grad=True)
    best, counts = confident(logits, 0.9)
    assert best.tolist() == [0, 0, 1] and counts.tolist() == [1, 0, 1] and not counts.requires_grad
    assert confident(torch.zeros(1, 4), 0.0)[1].tolist() == [1]
    assert spread(torch.tensor([1.0, 3.0, 5.0, 6.0]), 2).tolist() == [2.0, 5.5]
