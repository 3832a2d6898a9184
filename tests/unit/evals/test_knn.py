import math

import pytest
import torch
from torch import nn

import pipeline.evals.knn as knn
from pipeline.core.errors import ConfigError, DataError
from tests.contracts.components import ListStream, context, numbers, plain


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


def measured(streams, **settings):
    return numbers(knn.KNN(knn.Config(**settings)), context({"image": Identity()}, streams))


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
    results = measured(streams, k=ks, temperature=temperature)
    assert len(results) == 9  # the recall of the first k is the ninth
    for k in ks:
        top1, top5 = brute_force(streams, k, temperature)
        assert results[f"knn/top1_k{k}"].value == pytest.approx(top1)
        assert results[f"knn/top5_k{k}"].value == pytest.approx(top5)
        result = results[f"knn/top1_k{k}"]
        assert result.n == 31 and result.split == "val"
        assert result.stderr == pytest.approx(math.sqrt(top1 * (1 - top1) / 31))


def test_extreme_similarities_do_not_overflow(lone_group):
    streams = make_streams()
    results = measured(streams, k=(5,), temperature=1e-4)
    assert results["knn/top1_k5"].value == pytest.approx(brute_force(streams, 1, 1.0)[0])  # the nearest decides


def test_more_neighbours_than_samples_are_refused(lone_group):
    with pytest.raises(ConfigError, match="58 neighbours asked for, but stream 'train' has only 57"):
        measured(make_streams(), k=(5, 58))


def test_few_classes_have_no_top5(lone_group):
    streams = make_streams(classes=3)
    assert list(measured(streams, k=(5,))) == ["knn/top1_k5", "knn/mean_per_class_recall_k5"]


def test_a_class_without_a_vote_is_not_among_the_best_five(lone_group):
    """With one neighbour there is one vote, so that top-5 is top-1."""
    results = measured(make_streams(), k=(1, 2))
    assert results["knn/top5_k1"].value == results["knn/top1_k1"].value < 1
    assert (
        results["knn/top5_k1"].value
        <= results["knn/top5_k2"].value
        == pytest.approx(brute_force(make_streams(), 2, 0.07)[1])
    )


def test_votes_too_small_for_float_are_votes(lone_group):
    """exp(-2 / 1e-4) is 0, but the class is there, and those that are not come after it."""
    streams = make_streams()
    results = measured(streams, k=(5,), temperature=1e-4)
    assert results["knn/top5_k5"].value == pytest.approx(brute_force(streams, 5, 1.0)[1])


def test_classes_are_the_same_by_name(lone_group):
    """The queries' data set knows one class less, so that its numbers are others: by number 0, by name what it was."""
    streams = make_streams()
    expected = plainly(streams)
    fewer = streams["val"].label < 5
    streams["val"] = ListStream(streams["val"].image[fewer], streams["val"].label[fewer])
    same = plainly(streams)
    streams["val"].label = 4 - streams["val"].label
    streams["val"].classes = streams["val"].classes[::-1]
    assert plainly(streams) == same != expected


def plainly(streams):
    return {name: plain(number) for name, number in measured(streams, k=(5,)).items()}


def test_a_class_that_the_bank_does_not_know_is_named(lone_group):
    streams = make_streams()
    streams["val"].classes = ("class 0", "class 1", "class 2", "class 3", "class 4", "fox")
    with pytest.raises(
        DataError,
        match=r"stream 'val' has samples of class 'fox', which stream 'train' does not know; "
        r"stream 'train' knows class 'class 5' instead",
    ):
        measured(streams, k=(5,))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("columns", "k"), [(1, 1), (17, 17), (127, 1), (128, 1), (129, 2), (1000, 5), (4097, 3), (8191, 60), (8192, 64)]
)
def test_the_largest_are_found_by_blocks(columns, k, rows):
    """Where they lie together, apart, in the last columns, and where many are equal."""
    generator = torch.Generator().manual_seed(columns)
    random = torch.randn(rows, columns, generator=generator)
    for values in (random, random.sort(dim=1).values, random.round(), torch.full_like(random, -2.0)):
        found, place = knn.largest(values, k)
        assert torch.equal(found, values.sort(dim=1, descending=True).values[:, :k])
        assert torch.equal(values.gather(1, place), found)
        assert all(len(set(row.tolist())) == k for row in place)


def test_what_is_no_number_is_the_largest_as_in_a_sort():
    """Also where so many are none that no block is without one, and in the columns that fill no block."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 1003, generator=generator)
    values[70, 5] = values[71, 1002] = values[150, ::3] = math.nan
    found, place = knn.largest(values, 9)
    expected = values.sort(dim=1, descending=True).values[:, :9]
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 1 + 1 + 9
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(values.gather(1, place).nan_to_num(7), expected.nan_to_num(7))


def test_neighbours_are_those_of_a_sort(monkeypatch):
    """Over several parts of a bank, of which the last is small, in memory that was used before."""
    monkeypatch.setattr(knn, "BANK", 1000)
    generator = torch.Generator().manual_seed(0)
    query, bank = (nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (33, 3100))
    space = torch.full((40, 1000), math.inf)
    for k in (1, 7, 300):
        similarity, index = knn.nearest(query, bank, k, space)
        cosine = query.double() @ bank.double().T
        expected = cosine.sort(dim=1, descending=True).values[:, :k]
        assert all(len(set(row.tolist())) == k for row in index)
        for found in (similarity.double(), cosine.gather(1, index)):
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)
