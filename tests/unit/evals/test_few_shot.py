import math

import pytest
import torch

from pipeline.core.errors import ConfigError, DataError
from pipeline.evals.few_shot import Config, FewShot, ridge
from tests.contracts.components import context, numbers
from tests.unit.evals.test_knn import Identity, make_streams


def measured(streams, **settings):
    return numbers(FewShot(Config(**settings)), context({"image": Identity()}, streams))


def descended(x, label, test, classes, l2):
    """The same minimum by plain equations with the bias written out: the normal equations in float64, row by row."""
    x, test = x.double(), test.double()
    mean, std = x.mean(0), ((x - x.mean(0)) ** 2).mean(0).sqrt() + 1e-5
    known = torch.cat([(x - mean) / std, torch.full((len(x), 1), 100.0, dtype=torch.float64)], dim=1)
    asked = torch.cat([(test - mean) / std, torch.full((len(test), 1), 100.0, dtype=torch.float64)], dim=1)
    target = torch.full((len(x), classes), -1.0, dtype=torch.float64)
    for row, number in enumerate(label.tolist()):
        target[row, number] = 1.0
    augmented = torch.cat([known, math.sqrt(l2) * torch.eye(known.shape[1], dtype=torch.float64)])
    zeros = torch.zeros(known.shape[1], classes, dtype=torch.float64)
    return asked @ torch.linalg.lstsq(augmented, torch.cat([target, zeros]), driver="gelsd").solution


@pytest.mark.parametrize(("samples", "width"), [(6, 40), (60, 8)], ids=["fewer samples", "fewer features"])
def test_the_closed_form_is_the_least_squares_of_all_rows(samples, width):
    generator = torch.Generator().manual_seed(0)
    x, test = torch.randn(samples, width, generator=generator), torch.randn(9, width, generator=generator)
    label = torch.arange(samples) % 3
    for l2 in (0.5, 1024.0):
        found = ridge(x, label, test, 3, l2)
        torch.testing.assert_close(found, descended(x, label, test, 3, l2), rtol=1e-6, atol=1e-8)


def test_each_draw_has_so_many_of_each_class_and_more_hold_the_fewer():
    label = torch.arange(60) % 4
    evaluation = FewShot(Config())
    for draw in range(3):
        one, five = (evaluation.draw(label, shots, draw) for shots in (1, 5))
        assert torch.bincount(label[five]).tolist() == [5] * 4 and len(five.unique()) == 20
        assert set(one.tolist()) <= set(five.tolist())
    assert not torch.equal(evaluation.draw(label, 5, 0), evaluation.draw(label, 5, 1))
    assert not torch.equal(evaluation.draw(label, 5, 0), FewShot(Config(seed=1)).draw(label, 5, 0))


def test_mean_and_error_are_those_over_draws(lone_group):
    streams = make_streams(samples=(120, 31))
    found = measured(streams, shots=[1, 3], draws=4)
    train, test = streams["train"], streams["val"]
    for shots in (1, 3):
        hits, five = [], []
        for draw in range(4):
            chosen = FewShot(Config()).draw(train.label, shots, draw)
            scores = descended(train.image[chosen], train.label[chosen], test.image, 6, 2.0**10)
            hits.append([int(s.argmax()) == int(t) for s, t in zip(scores, test.label, strict=True)])
            ranked = [sorted(range(6), key=s.__getitem__, reverse=True)[:5] for s in scores.tolist()]
            five.append(sum(int(t) in best for best, t in zip(ranked, test.label, strict=True)) / 31)
        each = [sum(column) / 4 for column in zip(*hits, strict=True)]
        hits = [sum(row) / 31 for row in hits]
        mean = sum(hits) / 4
        error = math.sqrt(sum((h - mean) ** 2 for h in hits) / 3 / 4)
        result = found[f"few_shot/top1_{shots}shot"]
        assert result.value == pytest.approx(mean) and result.stderr == pytest.approx(error) and result.n == 31
        assert result.samples.tolist() == each and len(set(each)) > 2
        assert found[f"few_shot/top5_{shots}shot"].value == pytest.approx(sum(five) / 4)
    assert found["few_shot/top1_3shot"].value > found["few_shot/top1_1shot"].value > 1 / 6


def test_the_table_counts_the_guesses_of_all_draws(lone_group):
    streams = make_streams(samples=(120, 31))
    evaluation = FewShot(Config(shots=(2, 1), draws=3))
    with torch.no_grad():
        outputs = {o.name: o for o in evaluation.run(context({"image": Identity()}, streams))}
    counts, hits = [[0] * 6 for _ in range(6)], 0
    for draw in range(3):
        chosen = evaluation.draw(streams["train"].label, 2, draw)
        scores = descended(
            streams["train"].image[chosen], streams["train"].label[chosen], streams["val"].image, 6, 1024
        )
        for score, truth in zip(scores, streams["val"].label.tolist(), strict=True):
            counts[truth][int(score.argmax())] += 1
            hits += int(score.argmax()) == truth
    assert [row[1:] for row in outputs["few_shot/confusion_2shot"].rows] == counts
    assert outputs["few_shot/top1_2shot"].value == pytest.approx(hits / 93)


def test_too_few_samples_of_a_class_are_named(lone_group):
    with pytest.raises(ConfigError, match=r"few_shot\.shots: 500 samples of each class .* 'train' has only \d+ of"):
        measured(make_streams(), shots=[500])


def test_a_class_without_samples_to_learn_from_is_named(lone_group):
    streams = make_streams()
    streams["train"].label[streams["train"].label == 2] = 3
    streams["val"].label[0] = 2
    with pytest.raises(DataError, match=r"'val' has samples of 'class 2', of which stream 'train' has none"):
        measured(streams, shots=[1])
