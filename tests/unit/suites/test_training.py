"""Training inside an evaluation, against a plain loop with torch's optimizer over the same batches."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.durations import Duration
from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import Component, Data, Image, Optimizer, Training
from pipeline.core.manifest import load
from pipeline.core.protocols import Clock, DataFacts, Objective, StepContext
from pipeline.data.stream import open_stream
from pipeline.objectives import supervised
from tests.contracts.components import context, smoke_config

IMAGE = Image(size=32, crop="center")


def settings(**more) -> Training:
    own = {"length": Duration(5, "ba"), "global_batch": 8, "micro_batch": 4, "image": IMAGE, "workers": 0, "seed": 3}
    schedule = Component(name="constant")
    optimizer = Optimizer(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.01)
    return Training(**own | {"optimizer": optimizer, "schedule": schedule} | more)


def classifier(glyphs: Path) -> Objective:
    config = smoke_config("supervised")
    torch.manual_seed(0)
    settings = supervised.Config(**config.objective.settings)
    return supervised.Supervised(settings, DataFacts((32, 32), load(glyphs / "train").classes))


def plainly(objective: Objective, data: str) -> None:
    """The same updates, written out: decay for matrices alone."""
    decayed = [p for p in objective.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in objective.parameters() if p.requires_grad and p.ndim <= 1]
    skip = objective.no_weight_decay()
    named = dict(objective.named_parameters())
    rest += [named[name] for name in skip if named[name].ndim > 1]
    decayed = [p for p in decayed if all(p is not r for r in rest)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.8)
    objective.train()
    stream = open_stream(
        Data(train=data, fields=("image", "label"), image=IMAGE, workers=0),
        load(data), seed=3, global_batch=8, micro_batch=8, rank=0, world=1,
    )  # fmt: skip
    with closing(stream):
        for step, (batch,) in zip(range(5), stream.batches(0), strict=False):
            loss = objective(batch, StepContext(3, Clock(step, 8 * step, 40))).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_it_is_the_plain_loop(glyphs: Path, lone_group, tmp_path):
    ours, theirs = classifier(glyphs), classifier(glyphs)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    ctx = replace(context({}, {}), data={"train": str(glyphs / "train")}, folder=tmp_path)
    with torch.no_grad():  # as evaluations run
        drawn = torch.random.get_rng_state()
        ctx.train(ours, "train", settings())
        assert torch.equal(torch.random.get_rng_state(), drawn)  # looking does not touch
    plainly(theirs, str(glyphs / "train"))
    expected = dict(theirs.named_parameters())
    moved = [name for name, p in ours.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 10 and not ours.training
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_that_does_not_fit_is_named(glyphs: Path, lone_group, tmp_path):
    ctx = replace(context({}, {}), data={"train": str(glyphs / "train")}, folder=tmp_path)
    with pytest.raises(Mistakes, match=r"global_batch.*cannot be shared out"):
        ctx.train(classifier(glyphs), "train", settings(micro_batch=3))
