"""What the evaluations of generators share: the same numbers on any number of ranks."""

import json

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import NonFiniteError
from pipeline.dist.group import process_group
from pipeline.evals._samples import _classes, make
from pipeline.evals.agreement import Agreement
from pipeline.evals.agreement import Config as AgreementConfig
from pipeline.evals.frechet import Config as FrechetConfig
from pipeline.evals.frechet import Frechet
from pipeline.evals.likelihood import Config as LikelihoodConfig
from pipeline.evals.likelihood import Likelihood
from tests.unit.evals.generated import encoders, real, run


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
        made = make(encoders()["generator"], AgreementConfig(samples=21, batch=4), {})
        torch.save(torch.cat([part.image for part in made]), folder / f"{world}-{rank}.pt")
        (folder / f"{world}-{rank}.json").write_text(json.dumps(found))
        broken = encoders()
        if rank == world - 1:
            broken["generator"].denoiser.network.std.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="is not finite"):
            run(Agreement(AgreementConfig(samples=21, batch=4)), broken, streams)


def test_ranks_beyond_the_samples_make_none(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    assert list(_classes(encoders()["generator"], AgreementConfig(samples=3))) == []


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


def test_images_are_the_same_whoever_makes_them(folder):
    """O13: bit for bit, in batches of other sizes."""
    one, *two = (torch.load(folder / f"{part}.pt") for part in ("1-0", "2-0", "2-1"))
    assert len(one) == 21 and len(two[0]) == 11
    assert torch.equal(one[0::2], two[0]) and torch.equal(one[1::2], two[1])
