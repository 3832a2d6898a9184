"""Every number of real streams and an encoder: the same at any number of ranks, bit for bit, and at any batch size.

Shards are of uneven sizes, some of them empty, and the last batch is short.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.schema import Image
from pipeline.core import registry
from pipeline.core.evaluation import Number
from pipeline.data.evaluation import Part, open_eval
from pipeline.dist.group import process_group
from pipeline.suites.feature_cache import FeatureCache
from pipeline.suites.feature_store import FeatureStore
from tests.contracts.components import build_evaluation, build_objective, context, plain
from tests.unit.data.shards import members, write_data

SHARDS = {"train": [31, 0, 47, 2, 33], "val": [20, 1, 0, 23], "other": [17, 14]}
ELSEWHERE = {
    "the contracts of evaluations, which know texts": {"retrieval", "zero_shot"},
    "their own tests, since what a model is trained to differs in the last bits": {
        "attentive_probe", "classification_accuracy", "finetune", "segmentation", "test_time",
    },
    "test_generated.py": {
        "agreement", "denoiser_probe", "frechet", "inception_score", "kernel_distance", "likelihood", "memorisation",
        "prdc", "samples",
    },
}  # fmt: skip
"""Where the others are held to the same."""
NAMES = sorted(set(registry.names("pipeline.evals")) - set().union(*ELSEWHERE.values()))
"""All that a new evaluation is among, until it says why it cannot be."""
SETTINGS = {
    "selection": {"source": "val", "target": "other"},
    "ensemble_clustering": {"members": 2, "steps": 10},
    "latent_clustering": {"steps": 20},
    "knn": {"k": (5, 20)},
    "ood": {"k": 5},
    "open_set": {"test": "val"},
    "robustness": {"corruptions": ("fog", "contrast")},
}
"""Where defaults ask for more than there is, or take long."""


class Rounding(nn.Module):
    """An encoder that rounds otherwise in a batch of another size, as kernels of accelerators and of bf16 do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dim = inner, inner.dim

    def forward(self, image: Tensor) -> Tensor:
        found = self.inner(image)
        return found + 1e-6 * len(image) * found.roll(1, dims=1)


class Restorer(nn.Module):
    """Gives a darker image, other for each sample and seed, and makes of it one that is nearly right."""

    def forward(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return image // 2 + (ids + seed).remainder(5).to(torch.uint8).view(-1, 1, 1, 1), image - image % 7


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    for number, (name, sizes) in enumerate(SHARDS.items()):
        write_data(folder / name, sizes, lambda sample, first=1000 * number: members(first + sample))
    return folder


def measured(folder: Path, name: str, batch: int = 16, kept: bool = False, rounds: bool = False) -> list[Number]:
    """The numbers of an evaluation, in this rank of the present group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    encoders = build_objective("supervised").eval().encoders()
    if rounds:
        encoders = {name: Rounding(encoder).eval() for name, encoder in encoders.items()}
    encoders["restorer"] = Restorer()
    with ExitStack() as stack, torch.no_grad():
        streams = {
            split: stack.enter_context(
                closing(
                    open_eval(
                        folder / split,
                        Image(size=32, crop="center"),
                        ("image", "label"),
                        batch=batch,
                        workers=0,
                        part=Part(rank, world),
                    )
                )
            )
            for split in SHARDS
        }
        store = FeatureStore(cache=FeatureCache(folder, 10**9) if kept else None)
        facts = {split: stream.facts for split, stream in streams.items()}
        known = streams["val"].classes[:-1] if name == "open_set" else None  # the last one is unknown to the model
        ctx = context(encoders, streams, known, store=store, facts=facts, folder=folder / f"kept-{world}")
        evaluation = build_evaluation(name, **SETTINGS.get(name, {}))
        evaluation.check(ctx)
        return [output for output in evaluation.run(ctx) if isinstance(output, Number)]


def write(folder: Path) -> None:
    with process_group(timeout_minutes=1):
        for name in NAMES:
            found = json.dumps([plain(number) for number in measured(folder, name, rounds=True)])
            (folder / f"{name}-{dist.get_world_size()}-{dist.get_rank()}.json").write_text(found)


@pytest.mark.world_size(1)
def test_on_one_rank(data):
    write(data)


@pytest.mark.world_size(2)
def test_on_two_ranks(data):
    write(data)


@pytest.mark.world_size(4)
def test_on_four_ranks(data):
    write(data)


@pytest.mark.parametrize("name", NAMES)
def test_all_report_the_same(name, data):
    first, *others = [
        (data / f"{name}-{world}-{rank}.json").read_text() for world in (1, 2, 4) for rank in range(world)
    ]
    assert json.loads(first) and others == [first] * 6


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_batches_does_not_matter(name, data, lone_group):
    for number, other in zip(measured(data, name), measured(data, name, batch=5), strict=True):
        assert number.name == other.name and number.n == other.n
        assert other.value == pytest.approx(number.value, rel=1e-6, abs=1e-6)


def test_a_second_suite_reads_what_the_first_has_kept(data, lone_group, monkeypatch):
    expected = [plain(number) for number in measured(data, "knn")]
    assert [plain(number) for number in measured(data, "knn", kept=True)] == expected

    def never(self: object) -> None:
        raise AssertionError("it was walked")

    monkeypatch.setattr("pipeline.data.evaluation.OrderedStream.__iter__", never)
    assert [plain(number) for number in measured(data, "knn", kept=True)] == expected
    with pytest.raises(AssertionError, match="walked"):
        measured(data, "knn")
