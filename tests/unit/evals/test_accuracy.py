import math

import pytest
import torch

from pipeline.core.errors import ConfigError, DataError
from pipeline.evals.accuracy import Accuracy, Config
from tests.contracts.components import ListStream
from tests.unit.evals.test_knn import Identity


def run(logits, label, classes=None):
    stream = ListStream(torch.tensor(logits), torch.tensor(label))
    if classes is not None:
        stream.classes = tuple(map(str, range(classes)))
    with torch.no_grad():
        return {r.name: r for r in Accuracy(Config()).run({"logits": Identity()}, {"val": stream})}


def test_hits_counted_by_hand(lone_group):
    logits = [[5.0, 4, 3, 2, 1, 0], [0.0, 5, 4, 3, 2, 1], [1.0, 0, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]]
    results = run(logits, [0, 1, 2, 0], classes=6)  # right; right; fourth; last
    assert results["accuracy/top1"].value == 0.5 and results["accuracy/top5"].value == 0.75
    assert results["accuracy/top1"].stderr == math.sqrt(0.25 / 4) and results["accuracy/top1"].n == 4


def test_few_classes_have_no_top5(lone_group):
    assert list(run([[0.0, 1.0], [1.0, 0.0]], [1, 1])) == ["accuracy/top1"]


def test_another_number_of_classes_is_refused(lone_group):
    with pytest.raises(DataError, match="knows 2 classes, stream 'val' has 3"):
        run([[0.0, 1.0], [1.0, 0.0]], [1, 1], classes=3)


def test_an_unknown_stream_is_refused(lone_group):
    with pytest.raises(ConfigError, match=r"accuracy\.test"):
        list(Accuracy(Config(test="test")).run({"logits": Identity()}, {"val": None}))
