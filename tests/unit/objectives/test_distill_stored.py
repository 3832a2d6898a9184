"""A teacher by its stored outputs: the same start and losses, and nothing of another teacher."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import DataFacts
from pipeline.objectives.distill import Config, Distill
from pipeline.run.frozen import fill, leave_out
from tests.unit.objectives.test_distill import CLASSES, CTX, KL, NET, OTHER, VIT, batch, build, write_timm
from tests.unit.objectives.test_distill import alone as alone

STORED = {"weights": "big.safetensors", "stored": "outputs", **NET, **OTHER}


def stored_facts(**changes):
    """Of outputs of the teacher above, as `sluice prep embed` describes them."""
    told = {"path": "big.safetensors", "sha256": "abc", "image_size": [32, 32], **NET}
    told |= {name: list(value) for name, value in OTHER.items()}
    return {"outputs": {"teacher": told, "outputs": {"features": 16, "logits": 5}} | changes}


def build_stored(losses, facts=None, **teacher):
    torch.manual_seed(0)
    config = Config(**VIT, teachers={"big": STORED | teacher}, losses=losses)
    return Distill(config, DataFacts((32, 32), CLASSES, stored=stored_facts() if facts is None else facts))


POOLED = {"soft": {"kind": "kl"}, "hint": {"kind": "hint"}, "pairs": {"kind": "distances"}, "q": {"kind": "queue"}}


def test_stored_outputs_stand_in_for_the_teacher():
    """The same start, the same losses, and no weights of it; images of the batch are the student's alone."""
    live = build(POOLED, {"big": {"weights": "x", **NET, **OTHER}})
    student = build_stored(POOLED)
    assert student.needs == {"image": "uint8[B,3,H,W]"} | {
        "outputs_features": "float32[B,16]",
        "outputs_logits": "float32[B,5]",
    }
    own = student.state_dict()
    assert own and all(torch.equal(value, live.state_dict()[name]) for name, value in own.items())
    assert not [name for name, _ in student.named_parameters() if name.startswith("teachers.")]
    data = batch()
    taught = live.taught(data)["big"]
    outputs = {f"outputs_{name}": value for name, value in taught.items()}
    expected, found = live(data, CTX), student(data | outputs, CTX)
    torch.testing.assert_close(found.loss, expected.loss)
    assert {k: v.item() for k, v in found.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in expected.metrics.items()}
    )
    assert live.taught(data)["big"].keys() == {"features", "logits"}


def test_a_stored_teachers_file_may_be_missing_but_not_another(tmp_path, alone):
    path = tmp_path / "t.safetensors"
    student = build_stored(POOLED, weights=str(path))
    assert fill(student) == {"teachers.big": {"path": str(path), "sha256": "abc"}}
    write_timm(path)
    with pytest.raises(ConfigError, match=r"t.safetensors is changed: its sha256 is .*the stored outputs are of abc"):
        fill(student)
    leave_out(student)
    assert student.eval().encoders()["logits"](batch()["image"]).shape == (6, 5)


@pytest.mark.parametrize(
    ("teacher", "facts", "said"),
    [
        ({}, {}, r"teachers.big: there is no field of stored outputs 'outputs' \(there: none\)"),
        ({"encoder": "resnet34"}, None, "are of a teacher with encoder = 'resnet18', not 'resnet34'"),
        ({"std": (1.0, 1.0, 1.0)}, None, r"with std = \[0.2, 0.25, 0.3\], not \[1.0, 1.0, 1.0\]"),
        ({"image_size": 64}, None, r"with image_size = \[32, 32\], not \[64, 64\]"),
        ({"sha256": "def"}, None, "with sha256 abc, the configuration says def"),
        ({}, stored_facts(outputs={"features": 16}), "hold logits of 0 classes, and 5 are wanted"),
        ({}, stored_facts(outputs={"features": 16, "logits": 7}), "hold logits of 7 classes, and 5 are wanted"),
    ],
)
def test_outputs_of_another_teacher_are_refused(teacher, facts, said):
    with pytest.raises(ConfigError, match=said):
        build_stored(KL, facts, **teacher)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixing": {"mixup": 0.8}}, "stored outputs are of crops as they are"),
        ({"augment": {"layers": 2, "magnitude": 9}}, "stored outputs are of crops as they are"),
        ({"losses": {"a": {"kind": "attention", "block": "x"}}}, "losses.a: reads a block, which is not stored"),
    ],
)
def test_what_stored_outputs_cannot_serve(settings, said):
    with pytest.raises(ValidationError, match=said):
        Config(**VIT, **{"teachers": {"big": STORED}, "losses": KL} | settings)
