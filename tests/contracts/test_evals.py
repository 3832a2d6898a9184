"""What every evaluation of frozen features must do, for all that are found in the folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core import registry
from pipeline.core.evaluation import Evaluation, Figure, Number, Table
from pipeline.core.protocols import Batch
from pipeline.dist.group import process_group
from pipeline.nn.weights import weights_hash
from tests.contracts.components import ListStream, build_evaluation, context, numbers, plain

CLASSES = 6
NAMES = [
    name
    for name in registry.names("pipeline.evals")
    if not build_evaluation(name).trains  # through the loop, on data sets in files: their own tests hold them to it
    and set(build_evaluation(name).uses().encoders) <= {"image", "logits", "text"}
    and set(build_evaluation(name).uses().streams) <= {"train", "val"}
    and not any("mask" in fields for fields in build_evaluation(name).uses().streams.values())
]
"""Those that look at real images and their texts, of two streams; masks are of patches, which these encoders lack."""
SETTINGS = {
    "knn": {"k": (5, 20)},
    "ensemble_clustering": {"members": 2, "steps": 10},
    "latent_clustering": {"steps": 20},
    "linear_probe": {"steps": 200},
    "embedding_map": {"samples": 40, "perplexity": 5.0},
    "robustness": {"corruptions": ("gaussian_noise", "contrast"), "severities": (1, 5)},
    "semi_supervised": {"neighbours": 45},  # equal samples are one another's neighbours, 40 of a class
}
"""Where an evaluation's defaults ask for more than the tiny streams hold, or for much of the same."""


class Flat(nn.Module):
    """Pixels as features, moved by a parameter so that the device is known."""

    dim = 3 * 4 * 4

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(self.dim))

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1).float() / 255 + self.shift


class Nearest(nn.Module):
    """Logits of the class whose clean picture is nearest."""

    dim = CLASSES

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures(seed).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        return -torch.cdist(image.flatten(1).float() / 255, self.pictures)


def pictures(seed: int) -> Tensor:
    return torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


class Named(nn.Module):
    """The picture of a class, given its number in one token."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures(seed).flatten(1))

    def forward(self, text: Tensor, length: Tensor) -> Tensor:
        assert bool((length == 1).all())
        return self.pictures[text[:, 0]]


def streams(noise: float, seed: int = 0, rank: int = 0, world: int = 1) -> dict[str, ListStream]:
    """Each class is a random picture; ``noise`` from 0 (clean) to 1 (nothing else) hides it."""
    generator = torch.Generator().manual_seed(seed + 1000)
    made = {}
    for name, samples in (("train", 241), ("val", 103)):
        label = torch.arange(samples) % CLASSES
        clutter = torch.rand(samples, 3, 4, 4, generator=generator)
        image = ((1 - noise) * pictures(seed)[label] + noise * clutter).mul(255).to(torch.uint8)
        made[name] = ListStream(image, label, rank, world)
    return made


def run(name: str, folder: Path, streams: dict[str, ListStream], seed: int = 0) -> dict[str, Number]:
    return numbers(build_evaluation(name, **SETTINGS.get(name, {})), context(encoders(seed), streams, folder=folder))


def encoders(seed: int = 0) -> dict[str, nn.Module]:
    return {"image": Flat().eval(), "logits": Nearest(seed).eval(), "text": Named(seed).eval()}


def scores(name: str) -> Mapping[str, tuple[float, float]]:
    return build_evaluation(name, **SETTINGS.get(name, {})).scores(CLASSES)


@pytest.mark.parametrize("name", registry.names("pipeline.evals"))
def test_it_is_an_evaluation_with_a_strict_config(name):
    module = registry.module("pipeline.evals", name)
    assert issubclass(module.Config, Strict) and module.__doc__
    evaluation = build_evaluation(name)
    assert isinstance(evaluation, Evaluation) and evaluation.uses().encoders
    assert evaluation.trains == ("ctx.train(" in inspect.getsource(module))
    assert all(key.startswith(f"{name}/") and chance != perfect for key, (chance, perfect) in scores(name).items())


SCORED = [name for name in NAMES if scores(name)]
"""Those with metrics of which is known what chance and perfect features give."""


@pytest.mark.parametrize("name", SCORED)
def test_perfect_features_have_perfect_scores(name, lone_group, tmp_path):
    results = run(name, tmp_path, streams(noise=0.0))
    expected = {key: perfect for key, (_, perfect) in scores(name).items()}
    assert expected == {key: results[key].value for key in expected}
    assert all(results[key].n in (103, CLASSES) and results[key].split == "val" for key in expected)
    assert all(results[key].stderr == 0 for key in expected)


@pytest.mark.parametrize("name", SCORED)
def test_random_features_score_by_chance(name, lone_group, tmp_path):
    found = [run(name, tmp_path, streams(1.0, seed), seed) for seed in range(4)]
    for key, (chance, _) in scores(name).items():
        # 4 x 103 trials, or the 4 x 6 captions of retrieval; four standard errors of a share, and what a seed's
        # pictures have in common
        trials = sum(results[key].n for results in found)
        mean = sum(results[key].value * results[key].n for results in found) / trials
        assert abs(mean - chance) < 4 * (chance * (1 - chance) / trials) ** 0.5, (key, mean)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_what_it_says_is_used(name, lone_group, tmp_path):
    """An evaluation that looks at a stream or an encoder beside those of ``uses`` fails here."""
    evaluation = build_evaluation(name, **SETTINGS.get(name, {}))
    uses, whole = evaluation.uses(), streams(0.6)
    few = {n: Only(whole[n], ("id", *fields)) for n, fields in uses.streams.items()}
    ctx = context({n: encoders()[n] for n in uses.encoders}, few, folder=tmp_path)
    found, all_given = numbers(evaluation, ctx), run(name, tmp_path, whole)
    assert {n: plain(r) for n, r in found.items()} == {n: plain(r) for n, r in all_given.items()}


class Only:
    """A stream with some of its fields."""

    def __init__(self, whole: ListStream, fields: Sequence[str]) -> None:
        self.whole, self.classes, self.samples = whole, whole.classes, whole.samples
        self.fields = [*fields, *(["text_length"] if "text" in fields else [])]

    def __iter__(self) -> Iterator[Batch]:
        return ({name: batch[name] for name in self.fields} for batch in self.whole)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_prefixed_and_values_are_plain_numbers(name, lone_group, tmp_path):
    results = run(name, tmp_path, streams(0.6))
    assert all(key.startswith(f"{name}/") for key in results)
    assert json.dumps([plain(result) for result in results.values()], allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_the_mean_of_what_its_samples_add(name, lone_group, tmp_path):
    results = [r for r in run(name, tmp_path, streams(0.6)).values() if r.samples is not None]
    assert results or name not in {"accuracy", "few_shot", "knn", "linear_probe", "logistic_regression", "retrieval"}
    for result in results:
        assert result.samples is not None and result.samples.dtype in (np.bool_, np.float32)
        assert result.samples.shape == (result.n,) and result.value == pytest.approx(float(result.samples.mean()))
        assert result.sources is None or (result.sources.shape == (result.n,) and result.sources.dtype == np.int64)


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_figures_are_of_the_promised_form(name, lone_group, tmp_path):
    evaluation = build_evaluation(name, **SETTINGS.get(name, {}))
    ctx = context(encoders(), streams(0.6), folder=tmp_path)
    with torch.no_grad():
        evaluation.check(ctx)
        outputs = list(evaluation.run(ctx))
    for output in outputs:
        assert output.name.startswith(f"{name}/") and output.split in evaluation.uses().streams
        if isinstance(output, Table):
            assert output.columns and all(len(row) == len(output.columns) for row in output.rows)
            assert all(cell is None or type(cell) in (str, int, float) for row in output.rows for cell in row)
        elif isinstance(output, Figure):
            assert output.image.dtype == np.uint8 and output.image.ndim == 3 and output.image.shape[2] == 3


@pytest.mark.parametrize("name", NAMES)
def test_encoders_are_left_as_they_were(name, lone_group, tmp_path):
    known = encoders()
    before = weights_hash(known)
    numbers(build_evaluation(name, **SETTINGS.get(name, {})), context(known, streams(0.6), folder=tmp_path))
    assert weights_hash(known) == before
    assert not any(module.training for encoder in known.values() for module in encoder.modules())


def evaluate_on_ranks(folder, noise):
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        for name in NAMES:
            found = run(name, folder / f"kept-{world}", streams(noise, 0, rank, world))
            found = [plain(number) for number in found.values()]
            (folder / f"{name}-{world}-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.world_size(1)
def test_on_one_rank(folder):
    evaluate_on_ranks(folder, 0.8)


@pytest.mark.world_size(2)
def test_on_two_ranks(folder):
    evaluate_on_ranks(folder, 0.8)


@pytest.mark.world_size(4)
def test_on_four_ranks(folder):
    evaluate_on_ranks(folder, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_of_every_world_reports_the_same(name, folder):
    first, *others = [
        (folder / f"{name}-{world}-{rank}.json").read_text() for world in (1, 2, 4) for rank in range(world)
    ]
    assert others == [first] * 6 and (0.2 < json.loads(first)[0][1] < 1 or name not in SCORED)
