"""Attentive probes against attention that is written out, against each alone, and through a suite's data."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.config.schema import Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Clock, StepContext
from pipeline.evals._attentive import Attentive, AttentiveProbes, tokens
from pipeline.evals._probe import held_out
from pipeline.evals._training import settled
from pipeline.evals.attentive_probe import AttentiveProbing, Config
from pipeline.nn.weights import weights_hash
from tests.contracts.components import ListStream, context, numbers, plain
from tests.ranks import start_ranks
from tests.unit.evals.test_finetune import encoder, on_data
from tests.unit.evals.test_knn import Identity, make_streams
from tests.unit.nn.test_reading import RESNET, VIT

SMALL = {"length": Duration(6, "ba"), "batch": 16, "workers": 0}


def written_out(probe, x, heads):
    """Keys and values of every patch, a softmax for every query and head, in float64."""
    query, key, value, weight, bias = (
        p.detach().double() for p in (probe.query, probe.key, probe.value, probe.weight, probe.bias)
    )
    size = x.shape[2] // heads
    logits = []
    for patches in x.double():
        keys, values = patches @ key.T, patches @ value.T
        seen = torch.zeros(x.shape[2], dtype=torch.float64)
        for one in query:
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = torch.stack([one[part] @ k[part] / math.sqrt(size) for k in keys])
                shares = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
                seen[part] += sum(s * v[part] for s, v in zip(shares, values, strict=True)) / len(query)
        logits.append(weight @ seen + bias)
    return torch.stack(logits)


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (4, 1), (2, 3)])
def test_logits_are_those_of_attention_written_out(heads, queries):
    probes = AttentiveProbes(2, 8, 5, heads, queries, 0)
    with torch.no_grad():
        for number, parameter in enumerate(probes.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    x = torch.randn(3, 7, 8, generator=torch.manual_seed(9))
    for ours, probe in zip(probes(x), probes.probes, strict=True):
        torch.testing.assert_close(ours.detach().double(), written_out(probe, x, heads), rtol=1e-4, atol=1e-4)


def batch(samples):
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    ids = torch.arange(samples)
    return {"image": image, "label": ids % 5, "id": ids, "epoch": torch.zeros_like(ids)}


def test_probes_in_one_training_are_those_trained_alone():
    model = encoder()
    held = torch.zeros(12, dtype=torch.bool)
    held[:3] = True
    settings = [(1e-2, 0.0), (3e-2, 0.5), (1e-1, 0.1)]
    together = Attentive(model, AttentiveProbes(3, 24, 5, 4, 1, 7), held)
    groups = [
        {"params": list(p.parameters()), "lr": rate, "weight_decay": decay}
        for p, (rate, decay) in zip(together.probes.probes, settings, strict=True)
    ]
    optimizer, whole = torch.optim.AdamW(groups), batch(12)
    for _ in range(5):
        optimizer.zero_grad()
        together(whole, StepContext(0, Clock(0, 0, 12))).loss.backward()
        optimizer.step()
    x = tokens(model, whole["image"])[3:]
    for number, (rate, decay) in enumerate(settings):
        alone = AttentiveProbes(1, 24, 5, 4, 1, 7)
        own = torch.optim.AdamW(alone.parameters(), lr=rate, weight_decay=decay)
        for _ in range(5):
            own.zero_grad()
            functional.cross_entropy(alone(x)[0], whole["label"][3:]).backward()
            own.step()
        for ours, theirs in zip(together.probes.probes[number].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert not any(name.startswith("_frozen") or "backbone" in name for name, _ in together.named_parameters())


def test_a_micro_batch_of_held_out_samples_alone_moves_nothing():
    probes = AttentiveProbes(1, 24, 5, 4, 1, 0)
    held = torch.zeros(12, dtype=torch.bool)
    held[:4] = True
    objective = Attentive(encoder(), probes, held)
    loss = objective({name: value[:4] for name, value in batch(12).items()}, StepContext(0, Clock(0, 0, 12))).loss
    loss.backward()
    assert float(loss.detach()) == 0 and not any(p.grad.any() for p in probes.parameters())


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["transformer", "convolutions"])
def test_the_best_on_the_held_out_part_is_reported_and_the_encoder_is_left_as_it_was(
    glyphs, lone_group, tmp_path, monkeypatch, config
):
    model, made = encoder(config), []
    start = Attentive.__init__
    monkeypatch.setattr(Attentive, "__init__", lambda self, *args: (start(self, *args), made.append(self))[0])
    before = weights_hash({"image": model})
    with on_data(glyphs, model, tmp_path) as ctx, torch.no_grad():
        evaluation = AttentiveProbing(Config(rates=(1e-6, 1e-2), decays=(0.1,), **SMALL))
        evaluation.check(ctx)
        outputs = {o.name.removeprefix("attentive_probe/"): o for o in evaluation.run(ctx)}
        assert weights_hash({"image": model}) == before
        assert not any(module.training for module in model.modules())
        scores = {}
        for stream in ("train", "val"):
            parts = [(b["id"], made[0].logits(b["image"]), b["label"]) for b in ctx.streams[stream]]
            ids, label = (torch.cat([part[i] for part in parts]) for i in (0, 2))
            scores[stream] = (
                torch.cat([part[1] for part in parts], dim=1).argmax(2)[:, ids.argsort()],
                label[ids.argsort()],
            )
    guess, label = scores["train"]
    held, _ = held_out(len(label))
    reached = [(one[held] == label[held]).double().mean().item() for one in guess]
    assert [row[2] for row in outputs["probes"].rows] == pytest.approx(reached)
    best = reached.index(max(reached))
    guess, label = scores["val"]
    assert outputs["top1"].samples.tolist() == (guess[best] == label).tolist()
    assert outputs["rate"].value == (1e-6, 1e-2)[best] and outputs["rate_at_edge"].value == 1
    assert outputs["decay_at_edge"].value == 0  # the only one


def test_the_default_grid_is_that_of_vjepa_2():
    training = Config().training()
    assert len(Config().grid) == 20 and len(training.optimizer.groups) == 20
    rates = sorted({training.optimizer.lr * group.lr for group in training.optimizer.groups})
    assert rates == pytest.approx([1e-4, 3e-4, 1e-3, 3e-3, 5e-3])
    assert {group.weight_decay for group in training.optimizer.groups} == {0.01, 0.1, 0.4, 0.8}
    assert str(training.length) == "20ep" and training.optimizer.lr_scaling == "linear"


def test_images_of_training_are_as_large_as_the_suites_unless_they_are_set(lone_group):
    ctx = context({}, {"val": ListStream(torch.zeros(4, 3, 20, 28, dtype=torch.uint8), torch.arange(4) % 2)})
    left_out = settled(Config(batch=16).training(), ctx, "val")
    assert left_out.image.size == (20, 28) and left_out.image.crop == "random_resized" and left_out.micro_batch == 16
    chosen = Image(size=12, crop="center")
    assert settled(Config(image=chosen).training(), ctx, "val").image == chosen


def test_what_cannot_be_is_refused(lone_group):
    with pytest.raises(ConfigError, match="it has no patches to look at"):
        numbers(AttentiveProbing(Config()), context({"image": Identity()}, make_streams()))
    with pytest.raises(ConfigError, match="5 do not divide the encoder's width of 24"):
        AttentiveProbing(Config(heads=5)).heads_of(24)


def test_a_class_missing_from_training_is_named(glyphs, lone_group, tmp_path):
    with on_data(glyphs, encoder(), tmp_path) as ctx:
        train = ctx.features("image", "train")
        train.label[train.label == 2] = 3  # kept by the context
        with torch.no_grad(), pytest.raises(DataError, match=r"of which stream 'train' has none to learn from"):
            numbers(AttentiveProbing(Config(**SMALL)), ctx)


def on_ranks(glyphs, folder):
    from pipeline.dist.group import process_group

    with process_group(timeout_minutes=1), on_data(glyphs, encoder(), folder) as ctx:
        found = numbers(AttentiveProbing(Config(rates=(1e-2,), decays=(0.1, 0.4), **SMALL)), ctx)
        return [plain(number) for number in found.values()]


def test_every_rank_of_every_world_reports_the_same(glyphs, tmp_path):
    first, *others = [e.value for world in (1, 2) for e in start_ranks(world, on_ranks, glyphs=glyphs, folder=tmp_path)]
    assert first and others == [first, first]
