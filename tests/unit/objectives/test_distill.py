"""Students, teachers from files, and what is between them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from pipeline.config.schema import Component, RunConfig
from pipeline.core.components import check_component
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.nn.encoder import EncoderConfig, create_backbone
from pipeline.nn.weights import save, weights_hash
from pipeline.objectives.distill import Config, Distill
from pipeline.objectives.supervised import Config as SupervisedConfig
from pipeline.objectives.supervised import Supervised
from pipeline.run.frozen import fill, leave_out
from tests.contracts.components import smoke_config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
CLASSES = tuple(f"c{i}" for i in range(5))
VIT = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
NET = {
    "encoder": "resnet18",
    "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False},
}
OTHER = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
KL = {"answers": {"kind": "kl", "temperature": 2.0}}


@pytest.fixture
def alone():
    """A group of this rank, whose files are held against those of others."""
    with process_group(1.0):
        yield


def facts(classes=CLASSES, size=(32, 32)):
    return DataFacts(size, classes)


def build(losses=KL, teachers=None, classes=CLASSES, **settings):
    torch.manual_seed(0)
    teachers = teachers or {"big": {"weights": "big.safetensors", **NET}}
    return Distill(Config(**{**VIT, "teachers": teachers, "losses": losses, **settings}), facts(classes))


def batch(samples=6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(samples)
    return {
        "image": torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "label": ids % len(CLASSES),
        "id": ids,
        "epoch": torch.zeros_like(ids),
    }


def write_timm(path, classes=5, seed=3):
    """A whole timm model, with statistics of batch norm that are not those of the start."""
    torch.manual_seed(seed)
    model = timm.create_model(NET["encoder"], num_classes=classes, **NET["encoder_args"])
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    save_file(model.state_dict(), path)
    return model.eval()


def logits_of(model, image, mean, std):
    pixels = image.double() / 255
    x = (pixels - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    return copy.deepcopy(model).double()(x)


def test_a_teacher_of_timm_answers_as_timm_does_under_its_own_normalisation(tmp_path, alone):
    model = write_timm(tmp_path / "t.safetensors")
    student = build(teachers={"big": {"weights": str(tmp_path / "t.safetensors"), **NET, **OTHER}}).train()
    fill(student)
    data = batch()
    wanted = logits_of(model, data["image"], **OTHER)
    torch.testing.assert_close(student.teachers["big"](data["image"] / 255, []).logits.double(), wanted)
    given = student.head(student.encoder(data["image"])).double()
    p, q = (wanted / 2).softmax(1), (given / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    out = student(data, CTX)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert out.metrics["agreement_big"] == (wanted.argmax(1) == given.argmax(1)).float().mean()


def write_ours(path, seed=4, freeze=False):
    """All weights of a supervised objective as `sluice export` writes them."""
    torch.manual_seed(seed)
    settings = {**VIT, **OTHER}
    teacher = Supervised(SupervisedConfig(**settings, head_std=0.5), facts()).eval()
    config = smoke_config("supervised").model_dump(mode="json")
    config["objective"] = {"name": "supervised", **settings}
    save(
        path,
        teacher.state_dict(),
        {"config": RunConfig.model_validate(config).model_dump_json(), "facts": json.dumps(facts().plain())},
    )
    return teacher


def test_a_teacher_of_ours_answers_as_it_did(tmp_path, alone):
    ours = write_ours(tmp_path / "t.safetensors")
    student = build(teachers={"big": {"weights": str(tmp_path / "t.safetensors"), **VIT, **OTHER}})
    fill(student)
    data = batch()
    torch.testing.assert_close(student.teachers["big"](data["image"] / 255, []).logits, ours.logits(data["image"]))


def test_what_a_file_says_of_itself_is_held_against_the_configuration(tmp_path, alone):
    path = tmp_path / "t.safetensors"
    write_ours(path)
    mine = {"weights": str(path), **VIT}
    with pytest.raises(ConfigError, match=r"teachers.big: .*trained with mean = \[0.5, 0.4, 0.3\]"):
        fill(build(teachers={"big": mine}))
    with pytest.raises(ConfigError, match="number 1 is 'c1' there, 'other' in the data"):
        fill(build(teachers={"big": mine | OTHER}, classes=("c0", "other", "c2", "c3", "c4")))
    with pytest.raises(ConfigError, match="knows 5 classes, and the data has 4"):
        fill(build(teachers={"big": mine | OTHER}, classes=CLASSES[:4]))


def test_files_of_other_models_and_classes_and_changed_ones_are_named(tmp_path, alone):
    path = tmp_path / "t.safetensors"
    write_timm(path, classes=7)
    mine = {"weights": str(path), **NET}
    with pytest.raises(ConfigError, match=r"classifier is \(7, 16\) there, and \(5, 16\)"):
        fill(build(teachers={"big": mine}))
    with pytest.raises(ConfigError, match=r"is not of 'resnet18' with these encoder_args: .* missing"):
        fill(build({"f": {"kind": "hint"}}, {"big": mine | {"encoder_args": {"layers": [2, 1, 1, 1]}}}))
    with pytest.raises(ConfigError, match="is changed: its sha256 is"):
        fill(build(teachers={"big": mine | {"sha256": "abc"}}))
    save(path, create_backbone(EncoderConfig(**NET), (32, 32)).state_dict(), {})
    with pytest.raises(ConfigError, match="holds no classifier 'fc'"):
        fill(build(teachers={"big": mine}))
    fill(build({"f": {"kind": "hint"}}, {"big": mine}))
    assert fill(build({"f": {"kind": "hint"}}, {"big": mine}))["teachers.big"]["path"] == str(path)


def test_the_teacher_sees_the_same_crop_at_its_own_size(tmp_path):
    model = build({"f": {"kind": "hint"}}, {"big": {"weights": "x", **NET, **OTHER, "image_size": 64}})
    seen = []
    model.teachers["big"].encoder.backbone.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    data = batch()
    data["image"] = data["image"][:, :, :1, :1].expand(-1, -1, 32, 32).contiguous()
    model(data, CTX)
    assert seen[0].shape == (6, 3, 64, 64)
    # By its own mean and std, which are not the student's: written out.
    mean, std = (torch.tensor(OTHER[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(seen[0], ((data["image"][:, :, :1, :1] / 255 - mean) / std).expand_as(seen[0]))


def test_mixing_is_the_same_for_student_and_teacher():
    model = build(KL | {"labels": {"kind": "labels"}}, {"big": {"weights": "x", **NET, **OTHER}}, mixing={"mixup": 0.8})
    x, pixels, label = model.seen_by_student(batch(), CTX)
    torch.testing.assert_close(model.encoder.normalize(pixels), x)
    assert label.shape == (6, 5) and ((label > 0) & (label < 1)).any()
    torch.testing.assert_close(label.sum(1), torch.ones(6))
    plain = batch()["image"][0].float() / 255
    assert not torch.allclose(pixels[0], plain)


EVERY = {
    "labels": {"kind": "labels"},
    "hard": {"kind": "hard", "teacher": "other"},
    "dkd": {"kind": "dkd", "teacher": "big"},
    "dist": {"kind": "dist", "teacher": "other"},
    "hint": {"kind": "hint", "teacher": "big", "block": "blocks.1", "teacher_block": "layer4"},
    "attention": {"kind": "attention", "teacher": "other", "block": "blocks.0"},
    "angles": {"kind": "angles", "teacher": "other"},
    "contrast": {"kind": "contrast", "teacher": "big", "dim": 8},
    "queue": {"kind": "queue", "teacher": "other", "size": 16},
}
BOTH = {"big": {"weights": "x", **NET}, "other": {"weights": "y", **VIT}}


def test_teachers_never_change(tmp_path):
    """Weights and buffers: batch norm in train mode would move them."""
    model = build(EVERY, BOTH, balance=True).train()
    before = weights_hash({"teachers": model.teachers})
    own = weights_hash({"student": model.encoder, "connectors": model.connectors})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch(), CTX).loss.backward()
        optimizer.step()
        model.after_step(CTX.clock)
        model.train()
    assert weights_hash({"teachers": model.teachers}) == before
    assert weights_hash({"student": model.encoder, "connectors": model.connectors}) != own
    assert all(p.grad is None for p in model.teachers.parameters())


def test_losses_are_summed_by_their_weights_at_that_part_of_the_run():
    weights = {"answers": [[0.0, 0.0], [0.5, 2.0]], "hint": 3.0}
    losses = {n: {"kind": k, "weight": weights[n]} for n, k in (("answers", "kl"), ("hint", "hint"))}
    model = build(losses)
    for progress, weight in ((0, 0.0), (25, 1.0), (50, 2.0), (90, 2.0)):
        out = model(batch(), replace(CTX, clock=Clock(0, progress, 100)))
        expected = weight * out.metrics["loss_answers"] + 3 * out.metrics["loss_hint"]
        torch.testing.assert_close(out.loss.detach(), expected)


def test_balanced_losses_count_the_same_whatever_their_units():
    def gradient(factor):
        model = build({"hint": {"kind": "hint"}, "answers": {"kind": "kl"}}, balance=True)
        inner = model.config.losses["hint"]
        object.__setattr__(inner, "losses", lambda s, t, y: factor * (s - t).square().mean(1))
        model(batch(), CTX).loss.backward()
        model.after_step(CTX.clock)
        model.zero_grad()
        out = model(batch(2), CTX)
        out.loss.backward()
        return out.loss.detach(), model.encoder.backbone.cls_token.grad

    one, other = gradient(1.0), gradient(1000.0)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    model = build({"hint": {"kind": "hint"}, "answers": {"kind": "kl"}}, balance=True)
    assert model(batch(), CTX).loss.item() == pytest.approx(2.0)  # the first step is its own measure


def test_the_usual_size_is_an_average_over_updates():
    model = build({"hint": {"kind": "hint"}}, balance=True)
    sizes = []
    for samples in (6, 2, 4):
        sizes.append(model(batch(samples), CTX).metrics["loss_hint"].item())
        model.after_step(CTX.clock)
    expected = 0.99 * (0.99 * sizes[0] + 0.01 * sizes[1]) + 0.01 * sizes[2]
    assert model.usual.item() == pytest.approx(expected, rel=1e-5)


def test_the_queue_takes_the_step_in_place_of_the_oldest_and_after_the_update():
    model = build({"q": {"kind": "queue", "size": 8}})
    before = model.queue_q.clone()
    model(batch(6), CTX)
    assert torch.equal(model.queue_q, before)
    model.after_step(CTX.clock)
    keys = torch.nn.functional.normalize(model.teachers["big"](batch(6)["image"] / 255, []).features, dim=1)
    torch.testing.assert_close(model.queue_q[:6], keys)
    assert torch.equal(model.queue_q[6:], before[6:])
    model(batch(4), CTX)
    model.after_step(CTX.clock)
    again = torch.nn.functional.normalize(model.teachers["big"](batch(4)["image"] / 255, []).features, dim=1)
    torch.testing.assert_close(torch.cat([model.queue_q[6:], model.queue_q[:2]]), again)


def test_only_means_over_samples_need_no_second_pass():
    assert not build().compares and not build({"h": {"kind": "hint"}}).compares
    assert build({"d": {"kind": "distances"}}).compares and build(balance=True).compares


def test_the_student_is_exported_without_connectors_and_teachers():
    model = build(EVERY, BOTH)
    parts = {id(p) for e in model.encoders().values() for p in e.parameters()}
    assert not parts & {id(p) for p in (*model.connectors.parameters(), *model.teachers.parameters())}
    leave_out(model)
    assert not [name for name in model.state_dict() if name.startswith("teachers.")]
    assert model.eval().encoders()["logits"](batch()["image"]).shape == (6, 5)


def test_without_labels_and_classes_features_alone_are_followed():
    model = build({"h": {"kind": "hint"}, "d": {"kind": "distances"}}, classes=())
    assert list(model.needs) == ["image"] and list(model.encoders()) == ["image"]
    data = {name: value for name, value in batch().items() if name != "label"}
    assert model(data, CTX).loss.isfinite()


@pytest.mark.parametrize(
    ("losses", "more", "said"),
    [
        (
            {"h": {"kind": "hint", "block": "blocks.7"}},
            {},
            r"no block 'blocks.7'; there are \['blocks.0', 'blocks.1'\]",
        ),
        (
            {"h": {"kind": "hint", "block": "blocks.0"}},
            {},
            r"teachers.big: ResNet has no block 'blocks.0'; there are \['act1', 'layer1', 'layer2', ",
        ),
        (
            {"h": {"kind": "hint", "block": "blocks.0", "teacher_block": "layer1", "connector": False}},
            {},
            "losses.h: the student's features have 16 channels and the teacher's 8; set connector = true",
        ),
        ({"h": {"kind": "attention", "block": "head", "teacher_block": "layer1"}}, {}, "'head'.*is no map of places"),
        (KL, {"classes": ()}, "the data has no classes; set objective.classes"),
        ({"l": {"kind": "labels"}, **KL}, {"classes": ()}, "with labels needs the data's classes; the data has 0"),
    ],
)
def test_what_does_not_fit_is_a_config_error(losses, more, said):
    with pytest.raises(ConfigError, match=said):
        build(losses, **more)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"losses": {"a": {"kind": "kl", "teacher": "none"}}}, r"no teacher is called 'none'; there are \['big'\]"),
        ({"losses": {"a": {"kind": "kl"}}, "teachers": BOTH}, r"which teacher\? Set 'teacher' to one of"),
        ({"losses": {"a": {"kind": "kl", "teacher": "big"}}, "teachers": BOTH}, "no loss asks the teacher 'other'"),
        ({"losses": {"a": {"kind": "attention"}}}, "losses.a: set 'block'"),
        ({"losses": {"a": {"kind": "hint", "teacher_block": "x"}}}, "'teacher_block' without 'block'"),
        (
            {"losses": {"a": {"kind": "hint", "block": "x"}}, "checkpointing": True},
            "blocks cannot be read under 'checkpointing'",
        ),
        ({"losses": {"a": {"kind": "dkd"}}, "mixing": {"mixup": 0.8}}, "one label for each image"),
        ({"losses": {"a": {"kind": "labels", "teacher": "big"}}}, "labels ask no teacher"),
        ({"losses": {"a": {"kind": "kl", "weight": [[0.5, 1.0], [0.2, 0.0]]}}}, "parts rise from 0 to 1"),
        ({"losses": {"keys": {"kind": "kl"}}}, "cannot be called 'keys'"),
        ({"losses": {}}, "losses"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValidationError, match=said):
        build(**settings)


def test_mistakes_in_a_file_are_told_by_their_place():
    settings = {"name": "distill", **VIT, "teachers": {"big": {"weights": "x", **NET}}}
    for losses, said in (
        ({"soft": {"kind": "kl", "temprature": 2.0}}, r"losses.soft.temprature: .*did you mean 'temperature'\?"),
        ({"soft": {"kind": "kd"}}, r"losses.soft.kind: expected 'labels' or .*, found \"kd\""),
        ({"soft": {"kind": "kl", "temperature": 0}}, "losses.soft.*temperature"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_component("pipeline.objectives", Component(**settings, losses=losses), "a.toml", ("objective",))
