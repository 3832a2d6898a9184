"""The kernel distance, against a transcription in plain loops and against what is known of Gaussians."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import ConfigError
from pipeline.evals.kernel_distance import Config, KernelDistance, kernel_distances, squared_discrepancy, standard_error
from tests.contracts.components import context
from tests.unit.evals.generated import encoders, generator, real, run


def place():
    return context({}, {}).place


def plain(x, y):
    """Gretton et al. 2012, eq. 3, number by number."""

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (m * n)
    return xx + yy - 2 * xy


def gaussian(n, d=6, seed=0, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_formula_on_the_subsets_that_torch_fidelity_draws(lone_group):
    x, y = gaussian(23), gaussian(31, seed=1, mean=0.3)
    draw, expected = np.random.RandomState(2020), []
    for _ in range(4):
        rows = draw.choice(23, 9, replace=False), draw.choice(31, 9, replace=False)
        expected.append(plain(x[rows[0]].double(), y[rows[1]].double()))
    found = kernel_distances(x, y, 9, 4, place())
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert len({*found.tolist()}) == 4


def test_it_is_unbiased_and_of_known_size_for_gaussians():
    """E k(x, y) of the cubic kernel has a closed form: with s = x.y / D, E(1 + s)^3 = 1 + 3 E s + 3 E s^2 + E s^3.

    For x ~ N(m, 1) and y ~ N(m', 1) in one dimension s = x y, so the moments are products of those of normals.
    """

    def expected(m, other):
        moments = [lambda m: m, lambda m: m**2 + 1, lambda m: m**3 + 3 * m]
        first, second, third = (f(m) * f(other) for f in moments)
        return 1 + 3 * first + 3 * second + third

    truth = expected(0.0, 0.0) + expected(0.5, 0.5) - 2 * expected(0.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(600):
        x = torch.randn(2, 40, 1, dtype=torch.float64, generator=generator)
        found.append(float(squared_discrepancy(x[0], x[1] + 0.5)))
    error = float(np.std(found)) / math.sqrt(len(found))
    assert error < 0.3 * truth and abs(np.mean(found) - truth) < 4 * error
    same = [float(squared_discrepancy(*torch.randn(2, 20, 3, generator=generator).double())) for _ in range(600)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(600) and min(same) < 0


@pytest.mark.parametrize("size", [60, 100])
def test_the_standard_error_is_what_repetition_shows(size, lone_group):
    """As many draws of the data: the spread of the distance, and what each draw says of it."""
    values, errors = [], []
    for seed in range(40):
        found = kernel_distances(gaussian(120, 3, seed), gaussian(120, 3, seed + 1000, 0.7), size, 60, place())
        values.append(float(found.mean()))
        errors.append(standard_error(found, size, 120))
    assert 0.75 < np.mean(errors) / np.std(values) < 1.35
    assert standard_error(found, 120, 120) is None and standard_error(found[:1], 10, 120) is None


def test_it_sees_a_wrong_generator_and_knows_its_error(lone_group):
    own = Config(samples=200, subset=50, subsets=20)
    good = run(KernelDistance(own), encoders(), {"train": real(300)})
    bad = run(KernelDistance(own), encoders() | {"generator": generator(classes=0)}, {"train": real(300)})
    one, other = good["kernel_distance/kid"], bad["kernel_distance/kid"]
    assert abs(one.value) < 4 * one.stderr and other.value > 6 * other.stderr
    assert one.better == "lower" and one.n == 200
    assert abs(good["kernel_distance/kid_real"].value) < 4 * good["kernel_distance/kid_real"].stderr
    assert good["kernel_distance/kid_std"].value > one.stderr


def test_a_subset_is_of_different_images(lone_group):
    with pytest.raises(ConfigError, match=r"kernel_distance.subset = 50: there are only 20 samples; set it lower"):
        run(KernelDistance(Config(samples=20, subset=50)), encoders(), {"train": real(60)})
    with pytest.raises(ConfigError, match=r"subset = 50: there are only 40 images in stream 'train'"):
        run(KernelDistance(Config(samples=60, subset=50)), encoders(), {"train": real(40)})


def test_ranks_share_the_subsets(monkeypatch, lone_group):
    x, y, here = gaussian(20), gaussian(20, seed=1), place()
    whole = kernel_distances(x, y, 8, 7, here)
    assert dist.get_world_size() == 1
    parts = [kernel_distances(x, y, 8, 7, here.__class__(r, 3, 0, here.device, here.timeout)) for r in range(3)]
    assert all((part == 0).sum() > 3 for part in parts) and torch.equal(sum(parts), whole)
