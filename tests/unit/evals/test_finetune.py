"""Fine-tuning inside a suite: what moves and what does not, where it starts, and what it refuses."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Image, Optimizer, Training
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Clock, StepContext
from pipeline.data.evaluation import Part, open_eval
from pipeline.dist.group import process_group
from pipeline.engine.optimizers import rules
from pipeline.evals._finetuned import Classifier
from pipeline.evals.finetune import Config, FineTune
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.weights import weights_hash
from tests.contracts.components import context, numbers, plain
from tests.ranks import start_ranks
from tests.unit.evals.test_knn import Identity, make_streams
from tests.unit.nn.test_reading import RESNET, VIT

DROPPING = VIT.model_copy(update={"encoder_args": {**VIT.encoder_args, "drop_path_rate": 0.3}})


def encoder(config: EncoderConfig = VIT) -> ImageEncoder:
    torch.manual_seed(0)
    backbone = create_backbone(config, (32, 32), num_classes=0)
    model = ImageEncoder(Normalize(config.mean, config.std), backbone, "native")
    return model.eval().requires_grad_(False)


def training(**more) -> Training:
    own = {"length": Duration(4, "ba"), "global_batch": 16, "micro_batch": 8, "workers": 0, "seed": 3}
    own |= {"optimizer": Optimizer(lr=3e-3), "schedule": Component(name="constant")}
    return Training(**own | more)


@contextmanager
def on_data(glyphs, model, folder):
    """The context of an evaluation on a data set in files, on the rank that calls."""
    with ExitStack() as stack:
        image, fields = Image(size=32, crop="center"), ("image", "label")
        rank, world = dist.get_rank(), dist.get_world_size()
        opened = {
            name: open_eval(glyphs / name, image, fields, batch=16, workers=0, part=Part(rank, world))
            for name in ("train", "val")
        }
        streams = {name: stack.enter_context(closing(stream)) for name, stream in opened.items()}
        yield context({"image": model}, streams, folder=folder, data={name: str(glyphs / name) for name in streams})


def tuned(glyphs, model, folder, **settings):
    with on_data(glyphs, model, folder) as ctx:
        return numbers(FineTune(Config(**{"training": training()} | settings)), ctx)


@pytest.fixture
def made(monkeypatch):
    """The classifiers that an evaluation makes, the last one trained."""
    kept = []
    start = Classifier.__init__

    def noted(self, *args):
        start(self, *args)
        kept.append(self)

    monkeypatch.setattr(Classifier, "__init__", noted)
    return kept


@pytest.mark.parametrize("config", [DROPPING, RESNET], ids=["transformer", "batch norm"])
@pytest.mark.parametrize("mode", ["frozen", "partial", "full", "lp_ft"])
def test_the_encoder_is_left_as_it_was_and_its_copy_moves_as_far_as_is_said(
    glyphs, lone_group, tmp_path, made, config, mode
):
    model = encoder(config)
    before = weights_hash({"image": model})
    found = tuned(glyphs, model, tmp_path, mode=mode)
    assert weights_hash({"image": model}) == before
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    own, copied = model.state_dict(), made[-1].encoder.state_dict()
    moved = {name for name, value in copied.items() if not torch.equal(value, own[name])}
    if mode == "frozen":
        assert not moved
    elif mode == "partial":  # of three blocks, or of four stages of one block each, the last two
        first, last = ("blocks.1.", "blocks.2.") if config is DROPPING else ("layer3.", "layer4.")
        assert {n for n in moved if first in n} and {n for n in moved if last in n}
        rest = {n for n in moved if first not in n and last not in n}
        assert all(name.startswith(("backbone.norm", "backbone.fc_norm")) for name in rest)
    else:
        names = {name for name, _ in model.named_parameters()}
        assert len(names & moved) > 0.8 * len(names)
    assert found["finetune/top1"].samples.mean() == pytest.approx(found["finetune/top1"].value)
    assert found["finetune/top1"].n == len(found["finetune/top1"].samples) > 0


SMALL = {"length": Duration(1, "ba"), "optimizer": Optimizer(lr=1e-12)}
"""A step that is too small to move anything."""


def test_what_is_trained_on_is_learnt(glyphs, lone_group, tmp_path):
    still, long = training(**SMALL), training(length=Duration(160, "ba"), image=Image(size=32, crop="center"))
    start, end = (tuned(glyphs, encoder(), tmp_path, test="train", training=t) for t in (still, long))
    assert end["finetune/top1"].value > start["finetune/top1"].value + 0.15


def test_lp_ft_starts_from_the_head_of_the_linear_probe(glyphs, lone_group, tmp_path):
    """The probe's own guesses at the start, which are those of the images that it was fitted on."""
    found = tuned(glyphs, encoder(), tmp_path, mode="lp_ft", test="train", training=training(**SMALL))
    assert plain(found["finetune/top1"])[1:] == plain(found["finetune/top1_start"])[1:]
    drawn = tuned(glyphs, encoder(), tmp_path, mode="full", test="train", training=training(**SMALL))
    assert found["finetune/top1"].value > drawn["finetune/top1"].value + 0.1
    moved = tuned(glyphs, encoder(), tmp_path, mode="lp_ft", test="train")
    assert plain(moved["finetune/top1_start"]) == plain(found["finetune/top1_start"])
    assert plain(moved["finetune/top1"]) != plain(found["finetune/top1"])


def test_gradient_and_loss_are_torchs_own():
    model, weight = encoder(), torch.randn(5, 24, generator=torch.manual_seed(1))
    classifier = Classifier(model, weight, torch.zeros(5), None, 0.1)
    image = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = {
        "image": image,
        "label": torch.arange(6) % 5,
        "id": torch.arange(6),
        "epoch": torch.zeros(6, dtype=torch.int64),
    }
    output = classifier(batch, StepContext(0, Clock(0, 0, 6)))
    logits = (model(image) @ weight.T).log_softmax(1)
    target = torch.full((6, 5), 0.1 / 5).scatter_add_(1, batch["label"][:, None], torch.full((6, 1), 0.9))
    assert float(output.loss.detach()) == pytest.approx(float(-(target * logits).sum(1).mean()), rel=1e-5)
    assert float(output.metrics["top1"]) == pytest.approx(float((logits.argmax(1) == batch["label"]).float().mean()))


def test_layers_have_the_rates_of_layer_decay():
    classifier = Classifier(encoder(), torch.zeros(5, 24), torch.zeros(5), None, 0.0)
    scales = {name: rule.lr_scale for name, rule in rules(classifier, Optimizer(lr=1, layer_decay=0.5)).items()}
    assert scales["head.weight"] == 1 and scales["encoder.backbone.blocks.2.attn.qkv.weight"] == 0.5
    assert scales["encoder.backbone.blocks.0.attn.qkv.weight"] == 0.125
    assert scales["encoder.backbone.patch_embed.proj.weight"] == 0.0625
    undecayed = rules(classifier, Optimizer(lr=1, weight_decay=0.3))
    assert undecayed["encoder.backbone.pos_embed"].weight_decay == 0 == undecayed["head.bias"].weight_decay
    assert undecayed["head.weight"].weight_decay == 0.3


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.projection = encoder(), nn.Linear(24, 7)

    def forward(self, image):
        return self.projection(self.tower(image))


def test_an_encoder_inside_of_another_has_the_same_layers_and_what_follows_is_trained():
    classifier = Classifier(Projected(), torch.zeros(5, 7), torch.zeros(5), 1, 0.0).train()
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert {"encoder.projection.weight", "head.weight", "encoder.tower.backbone.norm.weight"} <= trained
    assert {name.split(".")[4] for name in trained if ".blocks." in name} == {"2"}
    blocks = classifier.encoder.tower.backbone.blocks
    assert [block.training for block in blocks] == [False, False, True]


def test_what_cannot_be_is_refused(lone_group):
    with pytest.raises(ValidationError, match=r"'blocks' is for mode = \"partial\", not 'full'"):
        Config(blocks=2)
    ctx = context({"image": encoder()}, make_streams())
    with pytest.raises(ConfigError, match="9 layers are to be trained, and the encoder has 4 that are known"):
        FineTune(Config(mode="partial", blocks=9)).check(ctx)
    with pytest.raises(ConfigError, match="2 layers are to be trained, and the encoder has 0"):
        FineTune(Config(mode="partial")).check(replace(ctx, encoders={"image": Identity()}))


def test_a_class_missing_from_training_is_named_before_anything_is_trained(lone_group):
    streams = make_streams()
    streams["train"].label[streams["train"].label == 2] = 3
    streams["val"].label[0] = 2
    with pytest.raises(DataError, match="'val' has samples of class 'class 2', of which stream 'train' has none"):
        numbers(FineTune(Config()), context({"image": Identity()}, streams))


def on_ranks(glyphs, folder):
    with process_group(timeout_minutes=1):
        found = tuned(glyphs, encoder(DROPPING), folder)
        return [plain(number) for number in found.values()]


def test_every_rank_of_every_world_reports_the_same(glyphs, tmp_path):
    first, *others = [e.value for world in (1, 2) for e in start_ranks(world, on_ranks, glyphs=glyphs, folder=tmp_path)]
    assert first and others == [first, first]
