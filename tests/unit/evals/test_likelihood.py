import math

import pytest
import torch

from pipeline.evals.likelihood import Config as LikelihoodConfig
from pipeline.evals.likelihood import Likelihood
from tests.unit.evals.generated import encoders, real, run


def test_bits_are_those_of_the_data(lone_group):
    """The denoiser is the best there is, so the bound is near the entropy of a Gaussian in bins of 1 / 127.5."""
    std = 0.05
    streams = {"val": real(100, std), "train": real(400, std, seed=1)}
    found = run(Likelihood(LikelihoodConfig()), encoders(std=std), streams)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    result = found["likelihood/bits_per_dim"]
    assert result.n == 100 and result.stderr < 0.1
    assert entropy - 4 * result.stderr < result.value < entropy + 0.6
    parts = sum(found[f"likelihood/bits_per_dim_{p}"].value for p in ("decoder", "levels", "prior"))
    assert parts == pytest.approx(result.value)
    # the classes are as likely, so the marginal of a pixel is wider than one class, and counting is dearer
    assert result.value < found["likelihood/histogram"].value < 8


def test_fewer_samples_are_the_same_ones_on_any_rank(lone_group):
    streams = {"val": real(100), "train": real(50)}
    found = run(Likelihood(LikelihoodConfig(samples=30)), encoders(), streams)
    assert found["likelihood/bits_per_dim"].n == 30
    chosen = Likelihood(LikelihoodConfig(samples=30))._chosen(torch.arange(100), 100)
    assert int(chosen.sum()) == 30 and chosen[-1] and int(chosen[:50].sum()) == 15
