import math

import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Bits, bits_name
from pipeline.evals._samples import chosen
from pipeline.evals.likelihood import Config as LikelihoodConfig
from pipeline.evals.likelihood import Likelihood
from tests.unit.evals.generated import CLASSES, SHAPE, encoders, real, run


def test_bits_are_those_of_the_data(lone_group):
    """The denoiser is the best there is, so the bound is near the entropy of a Gaussian in bins of 1 / 127.5."""
    std = 0.05
    streams = {"val": real(100, std), "train": real(400, std, seed=1)}
    found = run(Likelihood(LikelihoodConfig()), encoders(std=std), streams)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    result = found["likelihood/bits_per_dim_bound"]
    assert result.n == 100 and result.stderr < 0.1
    assert entropy - 4 * result.stderr < result.value < entropy + 0.6
    parts = sum(found[f"likelihood/bits_per_dim_bound_{p}"].value for p in ("decoder", "levels", "prior"))
    assert parts == pytest.approx(result.value)
    image, ids = streams["val"].image, torch.arange(100)
    with torch.no_grad():
        terms = encoders(std=std)["generator"].bits(image, ids, ids % CLASSES, 0, None)
    by_name = {"decoder": terms[:, 0], "levels": terms[:, 1:-1].sum(dim=1), "prior": terms[:, -1]}
    for name, values in by_name.items():
        number = found[f"likelihood/bits_per_dim_bound_{name}"]
        assert number.value == pytest.approx(float(values.mean()), rel=1e-5), name
    for name in ("bits_per_dim_bound", "bits_per_dim_bound_levels", "histogram"):
        number = found[f"likelihood/{name}"]
        assert len(number.samples) == 100 and number.samples.std() > 0
        assert float(number.samples.mean(dtype="float64")) == pytest.approx(number.value, rel=1e-6)
    # the classes are as likely, so the marginal of a pixel is wider than one class, and counting is dearer
    assert result.value < found["likelihood/histogram"].value < 8


def test_fewer_samples_are_the_same_ones_on_any_rank(lone_group):
    streams = {"val": real(100), "train": real(50)}
    found = run(Likelihood(LikelihoodConfig(samples=30)), encoders(), streams)
    assert found["likelihood/bits_per_dim_bound"].n == 30
    own = chosen(torch.arange(100), 100, 30)
    assert int(own.sum()) == 30 and 8 <= int(own[:50].sum()) <= 22
    assert torch.equal(chosen(torch.arange(60, 80), 100, 30), own[60:80])
    assert run(Likelihood(LikelihoodConfig(samples=300)), encoders(), streams)["likelihood/histogram"].n == 100


@pytest.mark.parametrize("wanted", [40, 50, 80])
def test_fewer_samples_are_of_all_classes_where_they_come_in_turn(wanted):
    """Four of five samples must not be all but those of a class."""
    for classes in (2, 4, 5):
        found = chosen(torch.arange(100), 100, wanted).nonzero()[:, 0] % classes
        assert (torch.bincount(found, minlength=classes) > wanted / classes / 2).all()


class Exact(nn.Module):
    """A model that is no diffusion: every value of a pixel is as likely, but for a class that it is told of."""

    classes, told, image_shape = CLASSES, "label", SHAPE

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.asked = []

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        raise AssertionError("nothing is made")

    def check_likelihood(self, steps):
        if steps is not None:
            raise ConfigError(f"likelihood.steps = {steps}: this model is exact and has no steps; leave it out")

    def likelihood(self, image, ids, prompt, seed, steps):
        self.asked += list(zip(ids.tolist(), prompt["label"].tolist(), strict=True))
        return Bits("exact", {"": 8.0 + prompt["label"].double()})


def test_whatever_knows_how_likely_images_are_can_be_measured(lone_group):
    model, streams = Exact(), {"val": real(33), "train": real(20)}
    found = run(Likelihood(LikelihoodConfig()), {"generator": model}, streams)
    labels = [i % CLASSES for i in range(33)]
    assert sorted(model.asked) == list(enumerate(labels))
    assert found.keys() == {"likelihood/bits_per_dim_exact", "likelihood/histogram"}
    assert found["likelihood/bits_per_dim_exact"].samples.tolist() == [8 + label for label in labels]
    assert found["likelihood/bits_per_dim_exact"].better == "lower"
    with pytest.raises(ConfigError, match="this model is exact and has no steps"):
        run(Likelihood(LikelihoodConfig(steps=5)), {"generator": model}, streams)


def test_what_the_model_is_told_must_be_in_the_batches(lone_group):
    class Silent:
        classes, samples, fingerprint = (), 3, ""

        def __iter__(self):
            return iter([{"image": real(3).image, "id": torch.arange(3)}])

    streams = {"val": Silent(), "train": real(20)}
    with pytest.raises(ConfigError, match='told "label": the suite\'s fields, or the data, lack it'):
        run(Likelihood(LikelihoodConfig()), {"generator": Exact()}, streams)


def test_draws_are_a_part_of_the_name_of_what_is_importance_weighted_and_of_nothing_else():
    assert bits_name("importance_weighted", 64) == "bits_per_dim_importance_weighted_64"
    for kind, draws in (("exact", 3), ("bound", 3), ("importance_weighted", None)):
        with pytest.raises(AssertionError, match="draws belong to importance weighting alone"):
            bits_name(kind, draws)
