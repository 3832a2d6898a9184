import math

import pytest
import torch
from torch import nn

from pipeline.evals.rank import Config, Rank, uniformity
from pipeline.nn.spread import rankme
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


def measured(x, encoder=None, **settings):
    stream = ListStream(x, torch.zeros(len(x), dtype=torch.int64))
    return numbers(Rank(Config(**settings)), context({"image": encoder or Identity()}, {"val": stream}))


def test_rankme_of_known_singular_values():
    """Orthonormal columns times sizes: the sizes are the singular values."""
    basis, _ = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    sizes = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    p = [0.5, 0.25, 0.125, 0.125]
    assert rankme(basis * sizes) == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-5)
    assert rankme(basis) == pytest.approx(4, rel=1e-5)
    assert rankme(torch.ones(9, 5)) == pytest.approx(1, rel=1e-4)


def test_uniformity_pair_by_pair(monkeypatch):
    monkeypatch.setattr("pipeline.evals.rank.ROWS", 4)
    unit = nn.functional.normalize(torch.randn(11, 3, generator=torch.Generator().manual_seed(1)))
    pairs = [(i, j) for i in range(11) for j in range(11) if i != j]
    mean = sum(math.exp(-2 * float((unit[i] - unit[j]).double().square().sum())) for i, j in pairs) / len(pairs)
    assert uniformity(unit) == pytest.approx(math.log(mean), rel=1e-6)


def test_points_all_around_have_spread_one_and_one_point_has_none(lone_group):
    around = torch.cat([torch.eye(6), -torch.eye(6)])
    assert measured(around, mirror=False)["rank/spread"].value == pytest.approx(1, rel=1e-6)
    collapsed = measured(torch.ones(12, 6), mirror=False)
    assert collapsed["rank/spread"].value == pytest.approx(0, abs=1e-6)
    assert collapsed["rank/uniformity"].value == pytest.approx(0, abs=1e-5)


class Weighted(nn.Module):
    """One number that mirror images share, and one that they do not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, image):
        columns = image.float().sum(dim=(1, 2))
        return torch.stack([columns.sum(dim=1), columns @ self.weight], dim=1)


def test_alignment_is_between_an_image_and_its_mirror_image(lone_group):
    image = torch.randint(0, 9, (7, 1, 3, 2), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found = measured(image, Weighted().eval())["rank/alignment"]
    distances = []
    for one in image.double().sum(dim=(1, 2)).tolist():
        a, b = ([sum(one), x + 2 * y] for x, y in (one, one[::-1]))
        distances.append(sum((p / math.hypot(*a) - q / math.hypot(*b)) ** 2 for p, q in zip(a, b, strict=True)))
    mean = sum(distances) / 7
    assert found.value == pytest.approx(mean, rel=1e-5) and mean > 1e-4
    error = math.sqrt(sum((d - mean) ** 2 for d in distances) / 6 / 7)
    assert found.stderr == pytest.approx(error, rel=1e-4) and found.better == "lower"
    assert found.samples.tolist() == pytest.approx(distances, rel=1e-4)
    assert "rank/alignment" not in measured(image, Weighted().eval(), mirror=False)
