"""Authenticity and copies, against plain loops, closed forms of random points, and a model that copies."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.evaluation import Figure, Table
from pipeline.evals.memorisation import Config, Memorisation, left_out, near
from tests.contracts.components import context
from tests.unit.evals.generated import CLASSES, real, run


def place():
    return context({}, {}).place


def points(n, d, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


def test_nearest_images_are_those_of_plain_loops(lone_group):
    made, train = points(30, 3).double().tolist(), points(40, 3, 1).double().tolist()
    found = near(points(30, 3), points(40, 3, 1), place())
    for i, x in enumerate(made):
        distances = [math.dist(x, y) for y in train]
        j = distances.index(min(distances))
        own = min(math.dist(train[j], y) for n, y in enumerate(train) if n != j)
        assert int(found.index[i]) == j
        assert float(found.distance[i]) == pytest.approx(distances[j], rel=1e-9)
        assert float(found.own[i]) == pytest.approx(own, rel=1e-9)
        assert bool(found.authentic[i]) == (own < distances[j])  # Alaa et al.: as dgm-eval has it
    assert 0 < int(found.authentic.sum()) < 30


def test_left_out_images_are_as_though_they_were_not_there(lone_group):
    train = points(25, 2)
    found = left_out(train, 25, place())
    for i in range(25):
        rest = torch.cat([train[:i], train[i + 1 :]])
        alone = near(train[i : i + 1], rest, place())
        assert float(found.distance[i]) == pytest.approx(float(alone.distance[0]), rel=1e-9)
        assert float(found.own[i]) == pytest.approx(float(alone.own[0]), rel=1e-9)
    few = left_out(train, 5, place())
    assert len(few.distance) == 5 and torch.isin(few.distance, found.distance).all()


@pytest.mark.parametrize(("dim", "mutual"), [(1, 2 / 3), (2, 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3)))])
def test_what_is_to_be_expected_of_new_images_is_known_for_random_points(dim, mutual, lone_group):
    """Those that are not authentic are neighbours of each other: 2/3 of the points of a line, 0.6215 of a plane's
    (Cox, "Reflexive nearest neighbours", Biometrics 1981). New points and those left out follow the same law."""
    train, fresh = points(4000, dim), points(4000, dim, 1)
    error = 4 * math.sqrt(mutual * (1 - mutual) / 2000)  # they come in pairs
    assert float(left_out(train, 4000, place()).authentic.double().mean()) == pytest.approx(1 - mutual, abs=error)
    assert float(near(fresh, train, place()).authentic.double().mean()) == pytest.approx(1 - mutual, abs=error)


class Copier(nn.Module):
    """Makes images that are copies of training images, moved by a little noise, for a part of the ids."""

    classes, told = CLASSES, "label"

    def __init__(self, train, part):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.train_images, self.part = train.image, part

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        fresh = real(len(self.train_images), seed=99).image
        copied = (ids.remainder(100) < 100 * self.part).view(-1, 1, 1, 1)
        return torch.where(copied, self.train_images[ids * 3 % len(fresh)], fresh[ids])


class Pixels(nn.Module):
    """All pixels as features."""

    dim = 48

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return image.flatten(1).float() * self.scale


@pytest.mark.parametrize("part", [0.0, 0.1, 1.0])
def test_copied_training_images_raise_the_alarm(part, lone_group):
    train = real(400)
    known = {"generator": Copier(train, part), "judge.image": Pixels()}
    found = run(Memorisation(Config(samples=300, shown=0)), known, {"train": train})
    copies, authentic = found["memorisation/copies"], found["memorisation/authenticity"]
    assert copies.value == pytest.approx(part, abs=0.03) and copies.better == "lower" and copies.n == 300
    assert found["memorisation/copies_real"].value == pytest.approx(0.01, abs=0.005)
    expected = found["memorisation/authenticity_real"]
    assert authentic.value == pytest.approx((1 - part) * expected.value, abs=0.09)
    for number in (copies, authentic):
        assert number.samples.dtype == np.bool_ and number.samples.mean() == pytest.approx(number.value)
    assert (copies.samples[: max(1, int(100 * part))] == (part > 0)).all()


def test_copies_of_images_that_the_data_holds_twice_are_seen(lone_group):
    train = real(40)
    train.image[20:] = train.image[:20]
    known = {"generator": Copier(train, 1.0), "judge.image": Pixels()}
    found = run(Memorisation(Config(samples=30, shown=0)), known, {"train": train})
    assert found["memorisation/copies"].value == 1 and found["memorisation/authenticity"].value == 0


def test_the_most_suspicious_are_shown_with_what_they_copy(lone_group):
    train = real(200)
    copier = Copier(train, 0.02)  # 0, 1, 100 and 101
    known = {"generator": copier, "judge.image": Pixels()}
    evaluation = Memorisation(Config(samples=150, shown=4))
    ctx = context(known, {"train": train}, tuple(f"class {i}" for i in range(CLASSES)))
    with torch.no_grad():
        outputs = list(evaluation.run(ctx))
        quiet = list(Memorisation(Config(samples=150, shown=0)).run(replace(ctx, kept={})))
    table = next(o for o in outputs if isinstance(o, Table))
    assert sorted(row[0] for row in table.rows) == [0, 1, 100, 101]
    assert all(row[1] == row[0] * 3 % 200 and row[2] == 0 < row[3] for row in table.rows)
    figure = next(o for o in outputs if isinstance(o, Figure)).image
    # a sample and what it copies are the same picture: find the two rows of squares by their height
    half = len(figure) // 2
    assert figure.shape[2] == 3 and (figure[20:70, 8:60] == figure[half + 20 : half + 70, 8:60]).all()
    assert not [o for o in quiet if isinstance(o, Table | Figure)]
