"""AdaBN and TENT: against plain loops on whole tensors, blind to the target's labels, and harmless to the model."""

from __future__ import annotations

import copy
from contextlib import ExitStack, closing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Image, Optimizer, Training
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, StepContext
from pipeline.data.evaluation import Part, open_eval
from pipeline.dist.group import process_group
from pipeline.evals._test_time import Tent, recalibrated
from pipeline.evals.test_time import TRAINING, Config, TestTime
from pipeline.nn.encoder import EncoderConfig, ImageClassifier, ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.weights import weights_hash
from tests.contracts.components import ListStream, context, numbers, plain
from tests.ranks import start_ranks
from tests.unit.nn.test_reading import RESNET, VIT

CPU = torch.device("cpu")
CTX = StepContext(seed=1, clock=Clock(0, 0, 10))


def classifier(config: EncoderConfig = RESNET, classes: int = 20) -> ImageClassifier:
    torch.manual_seed(0)
    backbone = create_backbone(config, (32, 32))
    encoder = ImageEncoder(Normalize(config.mean, config.std), backbone, "native")
    return ImageClassifier(encoder, nn.Identity(), nn.Linear(encoder.dim, classes)).eval().requires_grad_(False)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def test_statistics_are_those_of_all_samples_behind_layers_that_normalise_by_batch(lone_group):
    model, image = classifier(), images(22)
    found = recalibrated(model, ListStream(image, torch.zeros(22, dtype=torch.int64), batch=8), CPU)
    oracle = copy.deepcopy(model).double().train()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, norm in oracle.named_modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, []).append(given[0]))
    for part in image.split(8):
        oracle(part)
    assert len(seen) > 5
    for name, norm in found.named_modules():
        if name in seen:
            rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in seen[name]])
            torch.testing.assert_close(norm.running_mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norm.running_var.double(), rows.var(0), rtol=1e-4, atol=1e-5)
    assert not found.training and weights_hash({"": model}) == weights_hash({"": classifier()})


def test_tent_moves_as_a_plain_loop_of_the_paper_does(lone_group):
    model, image = classifier(), images(16)
    tent = Tent(model).train()
    own = copy.deepcopy(model)
    own.eval()
    affine = []
    for module in own.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.running_mean = module.running_var = None
            module.track_running_stats = False
            affine += [module.weight.requires_grad_(True), module.bias.requires_grad_(True)]
    ours = torch.optim.SGD([p for p in tent.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(affine, lr=0.1, momentum=0.9)
    for part in image.split(8):
        ids = torch.arange(8)
        loss = tent({"image": part, "id": ids, "epoch": torch.zeros_like(ids)}, CTX).loss
        p = own(part).softmax(dim=1)
        other = -(p * p.log()).sum(dim=1).mean()
        assert loss.item() == pytest.approx(other.item(), rel=1e-5)
        for optimizer, value in ((ours, loss), (theirs, other)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    expected = dict(own.named_parameters())
    trained = {name for name, p in tent.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(affine)
    for name, parameter in tent.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def training(**more) -> Training:
    own = {"length": Duration(3, "ba"), "global_batch": 16, "micro_batch": 16, "workers": 0, "fields": ("image",)}
    own |= {"optimizer": Optimizer(lr=1e-2), "schedule": Component(name="constant")}
    return Training(**own | more)


def measured(glyphs, model, folder, adapt="val", **settings):
    with ExitStack() as stack:
        rank, world = dist.get_rank(), dist.get_world_size()
        streams = {
            name: stack.enter_context(
                closing(
                    open_eval(
                        glyphs / split, Image(size=32, crop="center"), fields, batch=16, workers=0,
                        part=Part(rank, world),
                    )
                )
            )
            for name, split, fields in (("target", adapt, ("image",)), ("test", "val", ("image", "label")))
        }  # fmt: skip
        known = streams["test"].classes
        data = {"target": str(glyphs / adapt), "test": str(glyphs / "val")}
        ctx = context({"logits": model}, streams, known, folder=folder, data=data)
        return numbers(TestTime(Config(**{"training": training()} | settings)), ctx)


def test_all_three_are_reported_and_the_model_stays_as_it_was(glyphs, lone_group, tmp_path):
    model = classifier()
    before = weights_hash({"": model})
    found = measured(glyphs, model, tmp_path)
    assert {name for name in found if "top1" in name} == {f"test_time/top1_{n}" for n in ("source", "adabn", "tent")}
    assert weights_hash({"": model}) == before and not any(p.requires_grad for p in model.parameters())
    assert all(number.samples.mean() == pytest.approx(number.value) for number in found.values())
    few = measured(glyphs, model, tmp_path, methods=("adabn",))
    assert plain(few["test_time/top1_adabn"]) == plain(found["test_time/top1_adabn"])
    assert not any("tent" in name for name in few)


def test_the_target_is_seen_in_the_middle_of_its_images_unless_asked_otherwise(glyphs, lone_group, tmp_path):
    """Training reads centre crops: with those set by hand the numbers are the same, with random ones not."""
    default = training()
    assert "image" not in default.model_fields_set and "image" not in TRAINING.model_fields_set
    found, same, other = (
        measured(glyphs, classifier(), tmp_path, training=t)["test_time/top5_tent"].samples
        for t in (default, training(image=Image(size=32, crop="center")), training(image=Image(size=32)))
    )
    assert (found == same).all() and (found != other).any()


def on_ranks(glyphs, folder):
    with process_group(timeout_minutes=1):
        found = measured(glyphs, classifier(), folder, training=training(micro_batch=8))
        return {name: number.value for name, number in found.items()}


def test_ranks_report_the_same(glyphs, lone_group, tmp_path):
    alone = {name: number.value for name, number in measured(glyphs, classifier(), tmp_path).items()}
    first, second = (end.value for end in start_ranks(2, on_ranks, glyphs=glyphs, folder=tmp_path))
    assert first == second
    assert {name: first[name] for name in alone if "tent" not in name} == {
        n: v for n, v in alone.items() if "tent" not in n
    }
    assert first["test_time/top1_tent"] == pytest.approx(alone["test_time/top1_tent"], abs=0.02)


def test_what_cannot_be_adapted(glyphs, lone_group, tmp_path):
    with pytest.raises(ConfigError, match=r"no batch norm.*adapt_shot"):
        measured(glyphs, classifier(VIT), tmp_path)
    plain_norm = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(ConfigError, match="neither scale nor shift"):
        Tent(plain_norm)
    assert TestTime(Config()).uses().streams == {"target": ("image",), "test": ("image", "label")}
