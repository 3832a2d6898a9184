import math

import pytest
import torch
from torch import nn

import pipeline.evals.knn as knn
from pipeline.core.errors import ConfigError
from tests.contracts.components import ListStream


class Identity(nn.Module):
    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, image):
        return image + self.zero


def make_streams(samples=(57, 31), classes=6, dim=8):
    generator = torch.Generator().manual_seed(4)
    centre = torch.randn(classes, dim, generator=generator)
    streams = {}
    for name, n in zip(("train", "val"), samples, strict=True):
        label = torch.randint(0, classes, (n,), generator=generator)
        label[0] = classes - 1
        # a class without a sample in the bank, and vectors of very different length
        length = torch.rand(n, 1, generator=generator) * 10
        feature = (centre[label] + 1.5 * torch.randn(n, dim, generator=generator)) * length
        streams[name] = ListStream(feature, label)
    return streams


def brute_force(streams, k, temperature):
    """Votes one query and one neighbour at a time, in float64."""
    train, test = streams["train"], streams["val"]
    top1 = top5 = 0
    for query, truth in zip(test.image.double().tolist(), test.label.tolist(), strict=True):
        scored = []
        for key, label in zip(train.image.double().tolist(), train.label.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            scored.append((dot / math.hypot(*query) / math.hypot(*key), label))
        votes = [0.0] * 6
        for similarity, label in sorted(scored, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        ranking = sorted(range(6), key=lambda c: -votes[c])
        top1 += ranking[0] == truth
        top5 += truth in ranking[:5] and votes[truth] > 0
    return top1 / len(test.label), top5 / len(test.label)


@pytest.mark.parametrize(("queries", "bank"), [(1024, 65536), (7, 10), (31, 57), (1, 1)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force_in_any_chunks(monkeypatch, lone_group, queries, bank, temperature):
    monkeypatch.setattr(knn, "QUERIES", queries)
    monkeypatch.setattr(knn, "BANK", bank)
    streams, ks = make_streams(), (1, 5, 20, 57)
    with torch.no_grad():
        evaluation = knn.KNN(knn.Config(k=ks, temperature=temperature))
        results = {r.name: r for r in evaluation.run({"image": Identity()}, streams)}
    assert len(results) == 8
    for k in ks:
        top1, top5 = brute_force(streams, k, temperature)
        assert results[f"knn/top1_k{k}"].value == pytest.approx(top1)
        if k == 57:  # with fewer neighbours than classes, the order of classes without votes is nobody's business
            assert results[f"knn/top5_k{k}"].value == pytest.approx(top5)
        result = results[f"knn/top1_k{k}"]
        assert result.n == 31 and result.split == "val"
        assert result.stderr == pytest.approx(math.sqrt(top1 * (1 - top1) / 31))


def test_extreme_similarities_do_not_overflow(lone_group):
    streams = make_streams()
    with torch.no_grad():
        results = list(knn.KNN(knn.Config(k=(5,), temperature=1e-4)).run({"image": Identity()}, streams))
    assert results[0].value == pytest.approx(brute_force(streams, 1, 1.0)[0])  # the nearest decides


def test_more_neighbours_than_samples_are_refused(lone_group):
    with pytest.raises(ConfigError, match="58 neighbours asked for, but stream 'train' has only 57"):
        list(knn.KNN(knn.Config(k=(5, 58))).run({"image": Identity()}, make_streams()))


def test_few_classes_have_no_top5(lone_group):
    streams = make_streams(classes=3)
    with torch.no_grad():
        names = [r.name for r in knn.KNN(knn.Config(k=(5,))).run({"image": Identity()}, streams)]
    assert names == ["knn/top1_k5"]
