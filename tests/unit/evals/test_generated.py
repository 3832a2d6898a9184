import json
import math

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.dist.group import process_group
from pipeline.evals.agreement import Agreement
from pipeline.evals.agreement import Config as AgreementConfig
from pipeline.evals.frechet import Config as FrechetConfig
from pipeline.evals.frechet import Frechet, distance, moments
from pipeline.evals.likelihood import Config as LikelihoodConfig
from pipeline.evals.likelihood import Likelihood
from tests.contracts.components import ListStream
from tests.unit.evals.generated import CLASSES, SHAPE, Grey, generator, grey


def real(n=200, std=0.05, seed=0, rank=0, world=1):
    label = torch.arange(n) % CLASSES
    x = grey(label).view(-1, 1, 1, 1) + std * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return ListStream(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), label, rank, world, batch=40)


def encoders(**settings):
    return {"generator": generator(**settings), "judge.image": Grey(False), "judge.logits": Grey(True)}


def run(evaluation, encoders, streams):
    with torch.no_grad():
        return {r.name: r for r in evaluation.run(encoders, streams)}


def test_distance_of_known_gaussians(lone_group):
    """O11: d (delta^2 + (sigma1 - sigma2)^2) = 16 (1/16 + 1/4), exactly and from samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    mean, cov = x.mean(dim=0), torch.cov(x.T)
    values, vectors = torch.linalg.eigh(cov)
    x = (x - mean) @ (vectors * values.rsqrt()) @ vectors.T  # exactly N(0, 1) in its two moments
    one = moments(iter(x.split(999)), 16)
    assert distance(one, moments(iter([0.25 + 1.5 * x]), 16)) == pytest.approx(5.0, abs=1e-6)
    assert distance(one, one) == pytest.approx(0.0, abs=1e-6)
    sampled = 0.25 + 1.5 * torch.randn(20000, 16, generator=generator)
    assert distance(one, moments(iter([sampled]), 16)) == pytest.approx(5.0, abs=0.15)
    # a rotation of one, so that the two covariances do not commute
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    stretched = x * torch.linspace(0.5, 2, 16)
    found = distance(moments(iter([stretched]), 16), moments(iter([stretched @ turn]), 16))
    s = torch.diag(torch.linspace(0.5, 2, 16).double() ** 2)
    product = torch.linalg.eigvals(s @ (turn.T @ s @ turn))
    assert found == pytest.approx(float(2 * s.trace() - 2 * product.real.sqrt().sum()), rel=1e-6)


def test_it_shrinks_with_samples_and_grows_with_a_wrong_generator(lone_group):
    found = {n: run(Frechet(FrechetConfig(samples=n)), encoders(), {"train": real(1000)}) for n in (20, 1000)}
    values = {n: r["frechet/distance"].value for n, r in found.items()}
    assert 0 <= values[1000] < values[20] and values[1000] < 1e-3
    one_class = encoders() | {"generator": generator(classes=0)}
    wrong = run(Frechet(FrechetConfig(samples=200)), one_class, {"train": real(1000)})
    assert wrong["frechet/distance"].value > 100 * values[1000]
    assert wrong["frechet/width"].value == 3 and wrong["frechet/distance"].better == "lower"


def test_agreement_is_what_the_generator_does(lone_group):
    sharp = run(Agreement(AgreementConfig(samples=40)), encoders(), {})
    assert sharp["agreement/top1"].value == 1.0 and sharp["agreement/top1"].n == 40
    deaf = encoders()
    deaf["generator"].sampler = deaf["generator"].sampler.model_copy(update={"guidance": 0.0})
    # without guidance it makes the middle grey, which is class 2 of 5
    assert run(Agreement(AgreementConfig(samples=40)), deaf, {})["agreement/top1"].value == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="trained with condition"):
        run(Agreement(AgreementConfig(samples=4)), encoders() | {"generator": generator(classes=0)}, {})


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


def on_ranks(folder):
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        streams = {"train": real(60, 0.05, 1, rank, world), "val": real(31, 0.05, 0, rank, world)}
        found = {}
        for evaluation in (
            Frechet(FrechetConfig(samples=21, batch=4)),
            Agreement(AgreementConfig(samples=21, batch=4)),
            Likelihood(LikelihoodConfig(samples=9)),
        ):
            found |= {name: r.value for name, r in run(evaluation, encoders(), streams).items()}
        (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
        broken = encoders()
        if rank == world - 1:
            broken["generator"].denoiser.network.std.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="is not finite"):
            run(Agreement(AgreementConfig(samples=21, batch=4)), broken, streams)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated")


@pytest.mark.world_size(1)
def test_on_one_rank(folder):
    on_ranks(folder)


@pytest.mark.world_size(2)
def test_on_two_ranks(folder):
    on_ranks(folder)


def test_every_rank_of_every_world_reports_the_same(folder):
    one, *others = (json.loads((folder / f"{part}.json").read_text()) for part in ("1-0", "2-0", "2-1"))
    assert others[0] == others[1]
    for name, value in one.items():
        assert others[0][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
