import numpy as np
import torch
from torch import nn

from pipeline.evals.samples import Config, Samples
from tests.contracts.components import context
from tests.unit.evals.generated import CLASSES


class Numbered(nn.Module):
    """Images of one grey, which is their number; told classes or not."""

    told = "label"

    def __init__(self, classes):
        super().__init__()
        self.zero, self.classes = nn.Parameter(torch.zeros(())), classes

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        return ids.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def grid(classes, **settings):
    with torch.no_grad():
        ctx = context({"generator": Numbered(classes)}, {}, ())
        (figure,) = Samples(Config(**settings)).run(ctx)
    assert figure.name == "samples/grid"
    return figure.image[::6, ::6, 0], figure.caption  # images of 4 and gaps of 2


def test_first_samples_in_rows_of_all_classes(lone_group):
    found, caption = grid(CLASSES, samples=40, shown=17)
    assert np.array_equal(found, np.arange(15).reshape(3, CLASSES)) and "each column a class" in caption
    found, caption = grid(0, samples=40, shown=17)
    assert np.array_equal(found, np.arange(16).reshape(2, 8)) and "class" not in caption
    found, _ = grid(1000, samples=5)
    assert np.array_equal(found, np.arange(5)[None])
