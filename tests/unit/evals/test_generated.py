"""What the evaluations of generators share: the same numbers on any number of ranks."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.core.errors import ConfigError, DataError, NonFiniteError
from pipeline.core.evaluation import Figure
from pipeline.dist.group import process_group
from pipeline.evals import _neighbours
from pipeline.evals._samples import _classes, chosen
from pipeline.evals.agreement import Agreement
from pipeline.evals.agreement import Config as AgreementConfig
from pipeline.evals.denoiser_probe import Config as ProbeConfig
from pipeline.evals.denoiser_probe import DenoiserProbe
from pipeline.evals.frechet import Config as FrechetConfig
from pipeline.evals.frechet import Frechet
from pipeline.evals.inception_score import Config as InceptionConfig
from pipeline.evals.inception_score import InceptionScore
from pipeline.evals.kernel_distance import Config as KernelConfig
from pipeline.evals.kernel_distance import KernelDistance
from pipeline.evals.likelihood import Config as LikelihoodConfig
from pipeline.evals.likelihood import Likelihood
from pipeline.evals.memorisation import Config as MemorisationConfig
from pipeline.evals.memorisation import Memorisation
from pipeline.evals.prdc import PRDC
from pipeline.evals.prdc import Config as PRDCConfig
from pipeline.evals.samples import Config as SamplesConfig
from pipeline.evals.samples import Samples
from tests.contracts.components import context, numbers
from tests.unit.evals.generated import CLASSES, encoders, grey, real, run
from tests.unit.evals.test_denoiser_probe import Tapped


def on_ranks(folder):
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        streams = {"train": real(60, 0.05, 1, rank, world), "val": real(31, 0.05, 0, rank, world)}
        found = {}
        for evaluation in (
            Frechet(FrechetConfig(samples=21, batch=4)),
            Agreement(AgreementConfig(samples=21, batch=4)),
            InceptionScore(InceptionConfig(samples=21, batch=4, reference="val")),
            KernelDistance(KernelConfig(samples=21, batch=4, subset=15, subsets=9)),
            Likelihood(LikelihoodConfig(samples=9)),
            Memorisation(MemorisationConfig(samples=21, batch=4)),
            PRDC(PRDCConfig(samples=21, batch=4, k=3)),
        ):
            for name, r in run(evaluation, encoders(), streams).items():
                found[name] = [r.value, r.n, r.stderr, None if r.samples is None else r.samples.tolist()]
        tapped = encoders()
        tapped["generator"].denoiser.network = Tapped()
        for name, r in run(DenoiserProbe(ProbeConfig(noise=(0.0, 0.9), l2=(1e-2,))), tapped, streams).items():
            found[name] = [r.value, r.n, r.stderr]
        pictures = context(encoders(), streams)
        with torch.no_grad():
            for evaluation in (Samples(SamplesConfig(samples=21)), Memorisation(MemorisationConfig(samples=21))):
                for output in evaluation.run(pictures):
                    if isinstance(output, Figure):
                        found[output.name] = [int(output.image.sum()), output.image.flatten().tolist()]
        made = Agreement(AgreementConfig(samples=21, batch=4)).made(context(encoders(), {}))
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
def test_on_two_ranks(folder, monkeypatch):
    monkeypatch.setattr(_neighbours, "ROWS", 8)
    on_ranks(folder)


@pytest.mark.world_size(4)
def test_on_four_ranks(folder, monkeypatch):
    monkeypatch.setattr(_neighbours, "ROWS", 8)
    on_ranks(folder)


def test_every_rank_of_every_world_reports_the_same(folder):
    whole = json.loads((folder / "1-0.json").read_text())
    assert len(whole) == 44
    for world in (2, 4):
        found = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        assert all(other == found[0] for other in found)
        for name, value in whole.items():
            assert found[0][name][0] == pytest.approx(value[0], rel=1e-6, abs=1e-9), name
            for one, other in zip(value[1:], found[0][name][1:], strict=True):
                assert other == (one if one is None else pytest.approx(one, rel=1e-4, abs=1e-7)), name


def test_images_are_the_same_whoever_makes_them(folder):
    """O13: bit for bit, in batches of other sizes."""
    one, *two = (torch.load(folder / f"{part}.pt") for part in ("1-0", "2-0", "2-1"))
    assert len(one) == 21 and len(two[0]) == 11
    assert torch.equal(one[0::2], two[0]) and torch.equal(one[1::2], two[1])


class Painter(nn.Module):
    """Makes images without any diffusion: the grey of the class, told as a table and a setting of its own."""

    classes, told = CLASSES, "label"

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.asked = []

    def settings(self, values):
        if values.keys() - {"dark"}:
            raise ConfigError(f"sampler: no such setting, {sorted(values)}")
        return float(values.get("dark", 0.0))

    def make(self, ids, prompt, seed, settings):
        self.asked += [(int(i), int(label), seed) for i, label in zip(ids, prompt["label"], strict=True)]
        x = grey(prompt["label"]) - settings + self.zero
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_whatever_makes_images_can_be_measured(lone_group):
    painter = Painter()
    known = encoders() | {"generator": painter}
    found = run(Agreement(AgreementConfig(samples=12, batch=5, seed=3)), known, {})
    assert found["agreement/top1"].value == 1.0
    assert painter.asked == [(i, i % CLASSES, 3) for i in range(12)]
    dark = run(Agreement(AgreementConfig(samples=10, sampler={"dark": 0.4})), known, {})
    assert dark["agreement/top1"].value == pytest.approx(0.2)  # one step darker, so only the darkest stays itself
    with pytest.raises(ConfigError, match="no such setting"):
        run(Agreement(AgreementConfig(samples=4, sampler={"steps": 3})), known, {})
    with pytest.raises(ConfigError, match="knows how likely images are"):
        run(Likelihood(LikelihoodConfig()), known, {"train": real(4), "val": real(4)})


def test_settings_that_the_sampler_has_not_are_named():
    with pytest.raises(ConfigError, match=r"stepz: unknown key .did you mean 'steps'"):
        encoders()["generator"].settings({"name": "ddim", "stepz": 3})


def test_what_several_evaluations_ask_for_is_made_once(lone_group):
    painter = Painter()
    ctx = context(encoders() | {"generator": painter}, {"train": real(40)}, tuple(f"class {i}" for i in range(CLASSES)))
    numbers(Agreement(AgreementConfig(samples=8)), ctx)
    numbers(Frechet(FrechetConfig(samples=8)), ctx)
    assert len(painter.asked) == 8
    numbers(Agreement(AgreementConfig(samples=8, seed=1)), ctx)
    assert len(painter.asked) == 16


def test_the_judge_and_the_model_may_number_their_classes_differently(lone_group):
    names = [f"class {i}" for i in range(CLASSES)]
    ctx = context(encoders() | {"generator": Painter()}, {}, tuple(names))
    turned = replace(ctx, classes={**ctx.classes, "judge.logits": tuple(names[1:] + names[:1])}, kept={})
    evaluation = Agreement(AgreementConfig(samples=10))
    assert numbers(evaluation, ctx)["agreement/top1"].value == 1.0
    assert numbers(evaluation, turned)["agreement/top1"].value == 0.0
    stranger = replace(ctx, classes={**ctx.classes, "judge.logits": ("fox", *names[1:])}, kept={})
    with pytest.raises(DataError, match="the model has samples of class 'class 0', which the judge does not know"):
        numbers(evaluation, stranger)


class Reader(nn.Module):
    """Makes the grey that is the number of a text, and asks for nothing else."""

    classes, told = 0, "text"

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        assert prompt.keys() == {"text", "text_length"}
        x = grey(prompt["text"][:, 0]).view(-1, 1, 1, 1)
        x = x + 0.05 * torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(int(i))) for i in ids])
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_a_model_that_is_told_texts_is_judged_by_all_that_need_no_classes(lone_group):
    known, streams = encoders() | {"generator": Reader()}, {"train": real(90)}
    asked = {"samples": 40, "texts": "train"}
    evaluations = [
        Frechet(FrechetConfig(**asked)),
        InceptionScore(InceptionConfig(**asked)),
        KernelDistance(KernelConfig(**asked, subset=20)),
        Memorisation(MemorisationConfig(**asked)),
        PRDC(PRDCConfig(**asked)),
    ]
    found = {}
    for evaluation in evaluations:
        assert set(evaluation.uses().streams.get("train", ())) <= {"image", "text"}
        found |= run(evaluation, known, streams)
    assert found["prdc/coverage"].value > 0.8 and found["memorisation/copies"].n == 40
    ctx = context(known, streams, ())
    with torch.no_grad():  # as suites call it
        seen = evaluations[0].judged(ctx, "judge.image")
    assert torch.equal(seen.id, chosen(torch.arange(90), 90, 40).nonzero()[:, 0]) and seen.label is None
    with pytest.raises(ConfigError, match='needs a model that was trained with condition = "class"'):
        run(Agreement(AgreementConfig(**asked)), known, streams)
    with torch.no_grad():
        (figure,) = Samples(SamplesConfig(**asked)).run(ctx)
    assert figure.image.shape == (5 * 6 - 2, 8 * 6 - 2, 3)
