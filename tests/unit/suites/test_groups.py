"""Averages, against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.config.schema import Average
from pipeline.core.errors import DataError
from pipeline.core.evaluation import Number
from pipeline.record.outputs import keep
from pipeline.record.results import Origin, Row
from pipeline.suites.groups import Member, averaged, group_origin, members

SIZES = {"cifar": 40, "dtd": 10, "pets": 50}
HITS = {name: np.arange(n) % 3 < 1 + (n > 20) for name, n in SIZES.items()}


@pytest.fixture
def given(tmp_path) -> list[Member]:
    found = []
    for name, hits in HITS.items():
        p = float(hits.mean())
        numbers = [Number("knn/top1", p, len(hits), "val", math.sqrt(p * (1 - p) / len(hits)), samples=hits)]
        numbers.append(Number("knn/loss", 1 - p, len(hits), "val", better="lower"))
        origin = Origin("step 3", 3, "w", "knn", {"k": [20]}, {"test": name})
        found.append(Member("knn", name, f"knn on {name}", keep(tmp_path, numbers, origin).rows))
    return [*found, Member("rank", "cifar", "rank on cifar", [])]


def average(how: str = "macro", metrics=("knn/top1",), on=()) -> Average:
    return Average.model_validate({"metrics": metrics, "average": how, "on": on})


def one(average_: Average, given: list[Member]) -> Number:
    return averaged("all", average_, members(average_, given))


def test_data_sets_or_samples_count_the_same(given):
    macro, micro = one(average("macro"), given), one(average("micro"), given)
    means = [HITS[name].mean() for name in SIZES]
    assert macro.value == pytest.approx(sum(means) / 3)
    assert micro.value == pytest.approx(np.concatenate(list(HITS.values())).mean())
    assert (macro.name, micro.name, macro.n, macro.split) == ("all/macro", "all/micro", 100, "val")
    errors = [math.sqrt(p * (1 - p) / n) for p, n in zip(means, SIZES.values(), strict=True)]
    assert macro.stderr == pytest.approx(math.sqrt(sum((e / 3) ** 2 for e in errors)))
    weighed = [e * n / 100 for e, n in zip(errors, SIZES.values(), strict=True)]
    assert micro.stderr == pytest.approx(math.sqrt(sum(e**2 for e in weighed)))
    for number in (macro, micro):
        assert number.samples is not None and number.sources is None
        assert number.samples.mean() == pytest.approx(number.value, abs=1e-6) and len(number.samples) == 100


def test_some_data_sets_or_for_each_its_own_metric(given):
    assert one(average(on=("dtd",)), given).value == pytest.approx(HITS["dtd"].mean())
    own = one(average(metrics={"cifar": "knn/top1", "pets": "knn/t*"}), given)
    assert own.value == pytest.approx((HITS["cifar"].mean() + HITS["pets"].mean()) / 2)


def lost(given: list[Member]) -> list[Member]:
    return [member._replace(rows=None) if member.data_name == "dtd" else member for member in given]


@pytest.mark.parametrize(
    ("asked", "hurt", "says"),
    [
        (average(), lost, "knn on dtd has failed"),
        (average(metrics=("knn/top5",)), list, "knn on cifar has no number like 'knn/top5'"),
        (average(metrics=("knn/top1", "rank/*")), list, "rank on cifar has no number like"),
        (average(metrics=("probe/top1",)), list, "no evaluation of the suite has such metrics"),
        (average(metrics={"cifar": "probe/top1", "dtd": "knn/top1"}), list, "no evaluation on cifar has such metrics"),
        (average(metrics=("knn/*",)), list, "of some metrics more is better"),
    ],
)
def test_what_lacks_makes_no_other_average(asked, hurt, says, given):
    with pytest.raises(DataError, match=says):
        members(asked, hurt(given))


def test_a_part_without_an_error_leaves_the_average_without_one(given):
    rows: list[Row] = [row.__class__(**{**row.__dict__, "stderr": None}) for row in given[1].rows or []]
    number = one(average(), [given[0], given[1]._replace(rows=rows), given[2]])
    assert number.stderr is None and number.value == pytest.approx(one(average(), given).value)


def test_other_parts_are_another_average(given):
    def name(asked: Average) -> str:
        return group_origin("all", asked, members(asked, given)).name

    names = {name(a) for a in (average(), average("micro"), average(on=("dtd",)), average(metrics=("knn/loss",)))}
    assert len(names) == 4 and name(average()) in names
