"""Killed and resumed, a run goes on as if nothing had happened, with all that its method keeps beside the weights.

Queues, pointers and momentum copies of contrastive methods; targets, centres and teachers of those without negatives;
the queue and the usual sizes of losses of distillation; pseudo-labels, banks and teachers of adaptation and of learning
from few labels.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.tokenizer import train_tokenizer
from pipeline.engine.checkpoint import read_manifest
from pipeline.engine.fragments import MODEL, Spec, whole
from tests.integration.runs import codes, die_at, metrics, overrides, run, same_course, steps_of
from tests.integration.test_embed import write_teacher

BESIDE = "data.beside.unlabelled.path='{shards}'"
DISTILLED = ["objective.teachers.only.weights='{teacher}'", "objective.balance=true"]
DISTILLED += ["objective.losses.queue={{kind='queue', size=12}}"]
RUNS = {
    "clip": ("clip", ["engine.zero=2"], 4),
    "siglip": ("clip", ["objective.loss=sigmoid", "objective.share=blocks", "engine.name=accelerate"], 1),
    "simclr": ("simclr", [], 4),
    "moco v2": ("moco", ["engine.zero=3"], 4),
    "swav": ("swav", [], 4),
    "byol": ("byol", ["engine.name=accelerate"], 4),
    "ibot": ("dino", ["objective.masked.ratio=[0.2, 0.5]", "objective.masked.views=0.8"], 1),
    "moco v3": ("moco", ["objective.version=3", "objective.encoder_args.drop_path_rate=0.2"], 1),
    "shot": ("adapt_shot", ["objective.every='4ba'"], 1),
    "neighbours": ("adapt_neighbours", ["engine.zero=2", "objective.refresh='100%'"], 4),
    "pseudo-labels": ("pseudo_label", [BESIDE, "objective.alternate=[2, 1]"], 4),
    "mean teacher": ("mean_teacher", [BESIDE, "engine.zero=3"], 4),
    "fixmatch": ("fixmatch", [BESIDE], 1),
    "distillation": ("distill", [*DISTILLED, "engine.name=deepspeed", "engine.zero=2"], 4),
}
"""Objective, settings, and the number of ranks that a run of two is resumed with."""
SLOW = {"siglip", "simclr", "moco v2", "shot", "pseudo-labels", "mean teacher", "fixmatch", "swav", "byol", "ibot"}
SLOW.add("distillation")
"""Run by make test-all: how an engine saves and resumes is held by the others; what is these methods' own is in the
contract tests."""
LAST = 8


@pytest.fixture(scope="module")
def captioned(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned") / "train"
    shutil.copytree(glyphs / "train", folder)
    train_tokenizer(str(folder), 300)
    return folder


def weights(run_folder: Path) -> dict[str, Tensor]:
    """The model of the last checkpoint, whoever wrote it."""
    saved = read_manifest(run_folder / "checkpoints" / f"step-{LAST:08d}")
    specs: dict[str, Spec] = {n: s for n, s in saved.tensors.items() if n.startswith(f"{MODEL}/")}
    tensors = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for n, s in specs.items()}
    saved.fill([whole(n, t) for n, t in tensors.items()], 0)
    return tensors


def hashes(run_folder: Path) -> dict[str, object]:
    return read_manifest(run_folder / "checkpoints" / f"step-{LAST:08d}").files


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RUNS])
def test_it_resumes_bit_for_bit_and_at_another_world_size(name, captioned, tmp_path):
    objective, more, other_world = RUNS[name]

    def settings(folder: Path, world: int) -> list[str]:
        # Batch norm takes the statistics of one forward over all ranks, so there is no accumulation at any size.
        quick = [f"run.length={LAST}ba", f"engine.micro_batch={8 // world}", "engine.precision=fp32"]
        given = {"shards": captioned, "teacher": tmp_path / "teacher.safetensors"}
        return overrides(folder, captioned, *quick, *(word.format(**given) for word in more))

    if objective == "distill":
        write_teacher(tmp_path / "teacher.safetensors", captioned)

    straight, killed, elsewhere = (tmp_path / n for n in ("straight", "killed", "elsewhere"))
    assert codes(run(2, objective, settings(straight, 2))) == [0, 0]
    assert codes(run(2, objective, settings(killed, 2), hurt=partial(die_at, 5)))[1] == -9
    assert steps_of(killed) == [3]
    shutil.copytree(killed, elsewhere)

    assert codes(run(2, objective, settings(killed, 2))) == [0, 0]
    assert metrics(killed) == metrics(straight)
    assert hashes(killed) == hashes(straight)  # weights, momentum copies, queue, pointer, optimizer: every bit

    assert codes(run(other_world, objective, settings(elsewhere, other_world))) == [0] * other_world
    # The last bit decides on which side of zero some unit of a rectifier is: from there on the runs part, slowly.
    same_course(elsewhere, straight, slack=300)
    found = weights(elsewhere)
    for key, expected in weights(straight).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    if name == "moco v2":
        assert int(found[f"{MODEL}/filled"]) == LAST * 8 % 24
    if name == "distillation":
        assert int(found[f"{MODEL}/filled_queue"]) == LAST * 8 % 12 and int(found[f"{MODEL}/seen"]) == LAST
