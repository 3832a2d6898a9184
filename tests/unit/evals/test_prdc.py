"""Precision, recall, density and coverage, against a transcription in plain loops and what is known in closed form."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.evals import _neighbours
from pipeline.evals.prdc import PRDC, Config, compare
from tests.contracts.components import context
from tests.unit.evals.generated import STEPS, encoders, generator, real, run


def place():
    return context({}, {}).place


def gaussian(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def mean(values):
    return float(values.double().mean())


def plain(made, real, k):
    """Kynkaanniemi et al. eq. 1 and 2, Naeem et al. eq. 3 and 4, image by image."""
    reach = [sorted(math.dist(x, y) for j, y in enumerate(real) if i != j)[k - 1] for i, x in enumerate(real)]
    made_reach = [sorted(math.dist(x, y) for j, y in enumerate(made) if i != j)[k - 1] for i, x in enumerate(made)]
    inside = [[math.dist(x, y) <= r for y, r in zip(real, reach, strict=True)] for x in made]
    precision = [any(row) for row in inside]
    density = [sum(row) / k for row in inside]
    coverage = [any(row[j] for row in inside) for j in range(len(real))]
    recall = [any(math.dist(x, y) <= r for x, r in zip(made, made_reach, strict=True)) for y in real]
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_they_are_the_formulas_in_blocks(k, monkeypatch, lone_group):
    made, real = gaussian(37, 4, 0), 0.7 * gaussian(52, 4, 1) + 0.4
    expected = plain(made.double().tolist(), real.double().tolist(), k)
    for rows, bank in ((1024, 8192), (5, 7)):
        monkeypatch.setattr(_neighbours, "ROWS", rows)
        monkeypatch.setattr(_neighbours, "BANK", bank)
        for found, wanted in zip(compare(made, real, k, place()), expected, strict=True):
            torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=1e-6, atol=0)
    assert 0 < sum(expected[0]) < 37 and 0 < sum(expected[3]) < 52


def test_of_one_distribution_density_is_one_and_coverage_is_known(lone_group):
    """Naeem et al., eq. 8: the expected coverage of M real and N made images is 1 - P(the k nearest are real)."""
    k, n = 3, 600
    found = [compare(gaussian(n, 5, s), gaussian(n, 5, 50 + s), k, place()) for s in range(4)]
    none_made = math.prod((n - 1 - i) / (2 * n - 1 - i) for i in range(k))
    coverage = torch.stack([f.coverage.double().mean() for f in found])
    density = torch.stack([f.density.double().mean() for f in found])
    assert float(coverage.mean()) == pytest.approx(1 - none_made, abs=0.02)
    assert float(density.mean()) == pytest.approx(1.0, abs=0.05)


def test_each_sees_what_it_is_for(lone_group):
    """Made images in one corner are precise and cover little; spread too far they are not precise and recall all."""
    real = gaussian(300, 2, 0)
    corner, wide = (compare(width * gaussian(300, 2, 1), real, 3, place()) for width in (0.2, 6))
    assert mean(corner.precision) > 0.95 and mean(corner.recall) < 0.3 and mean(corner.coverage) < 0.3
    assert mean(wide.precision) < 0.5 and mean(wide.recall) > 0.8
    copies = compare(real.clone(), real, 3, place())
    assert all(mean(part) >= 1 for part in copies)


def test_equal_images_lie_in_a_ball_that_has_no_room(lone_group):
    """More equal real images than k: the ball is a point, and their copies are still inside."""
    real = torch.cat([torch.full((4, 3), 0.1), gaussian(20, 3, 0)])
    made = torch.cat([torch.full((2, 3), 0.1), 50 + gaussian(6, 3, 1)])
    found = compare(made, real, 3, place())
    assert found.precision.tolist() == [True] * 2 + [False] * 6
    assert found.coverage[:4].all()


def test_recall_sees_what_precision_does_not(lone_group):
    """Ten steps of DDIM make images that are too much alike, and a model that is told no class makes one grey."""
    streams = {"train": real(300)}
    own = {steps: Config(samples=100, real=100, sampler={"name": "ddim", "steps": steps}) for steps in (10, STEPS)}
    good, few = (run(PRDC(own[steps]), encoders(), streams) for steps in (STEPS, 10))
    flat = run(PRDC(own[STEPS]), encoders() | {"generator": generator(std=0.01, classes=0)}, streams)
    assert min(good["prdc/precision"].value, few["prdc/precision"].value) > 0.95
    assert good["prdc/recall"].value > 0.7 > 0.2 > few["prdc/recall"].value and few["prdc/density"].value > 1.5
    assert good["prdc/coverage"].value > 0.9 > 0.3 > flat["prdc/coverage"].value
    assert good["prdc/coverage_real"].value > 0.75 and good["prdc/coverage_real"].better is None
    sizes = {name: number.n for name, number in good.items()}
    assert sizes == {f"prdc/{n}{w}": 100 for n in ("precision", "recall", "density", "coverage") for w in ("", "_real")}
    for name, number in good.items():
        if not name.endswith("_real"):
            assert len(number.samples) == number.n
            assert float(number.samples.mean()) == pytest.approx(number.value, abs=1e-6)


def test_a_ball_needs_more_images_than_it_reaches_to(lone_group):
    with pytest.raises(ConfigError, match=r"prdc.k = 5: there are only 5 samples; set k lower"):
        run(PRDC(Config(samples=5)), encoders(), {"train": real(50)})
    with pytest.raises(ConfigError, match=r"there are only 5 images in half of stream 'train'"):
        run(PRDC(Config(samples=50)), encoders(), {"train": real(10)})
    assert run(PRDC(Config(samples=50, baseline=False)), encoders(), {"train": real(10)})["prdc/recall"].n == 10


def test_ranks_share_the_samples(monkeypatch, lone_group):
    """What each finds is zero elsewhere, so that sums are the whole."""
    monkeypatch.setattr(_neighbours, "ROWS", 6)
    x, y = gaussian(40, 3, 0), gaussian(33, 3, 1)
    whole = _neighbours.nearest(x, y, 2, place())
    parts = [_neighbours.nearest(x, y, 2, replace(place(), rank=r, world_size=3)) for r in range(3)]
    assert all((part[0] == 0).any() for part in parts)
    assert torch.equal(sum(p[0] for p in parts), whole[0]) and torch.equal(sum(p[1] for p in parts), whole[1])
    torch.testing.assert_close(whole[0][:, 0].sqrt(), torch.cdist(x.double(), y.double()).min(dim=1).values)


def test_the_distance_of_equal_features_is_exactly_zero():
    x = 100 + gaussian(64, 384, 0).double()
    assert (_neighbours.squared(x, x).diagonal() == 0).all() and (_neighbours.squared(x, x[:3])[3:] > 0).all()
