"""CLIP by its teachers: affinities of the batch in both directions, teachers from files and from stored outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.nn.distillation.affinity import affinity
from pipeline.nn.weights import save, weights_hash
from pipeline.objectives import clip
from pipeline.objectives.distill_clip import Config, DistillClip
from pipeline.run.frozen import fill
from tests.contracts.components import facts, make_batch, smoke_config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
SMOKE = smoke_config("distill_clip")
STUDENT = {name: value for name, value in SMOKE.objective.settings.items() if name != "teachers"}
TEACHER = SMOKE.objective.settings["teachers"]["only"]


def build(teachers=None, stored=None, **settings):
    torch.manual_seed(0)
    config = Config(**{**STUDENT, "teachers": teachers or {"only": TEACHER}, **settings})
    return DistillClip(config, replace(facts(SMOKE), stored=stored or {}))


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_affinity_is_that_of_the_paper():
    """Written out with loops: each image over all texts, and each text over all images."""
    image, text, its_image, its_text = (unit(5, d, seed=s) for s, d in enumerate((4, 4, 3, 3)))
    scale, teacher = torch.tensor([7.0], dtype=torch.float64), 11.0
    found = affinity(image, text, scale, its_image, its_text, teacher)
    sides = ((image.tolist(), text.tolist(), its_image.tolist(), its_text.tolist()),)
    sides += tuple((b, a, d, c) for a, b, c, d in sides)
    expected = [0.0] * 5
    for mine, others, its, theirs in sides:
        for i in range(5):
            q = softmax([7 * sum(a * b for a, b in zip(mine[i], row, strict=True)) for row in others])
            p = softmax([11 * sum(a * b for a, b in zip(its[i], row, strict=True)) for row in theirs])
            expected[i] -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 2
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_only_the_student_and_its_temperature_learn_and_bf16_is_computed_in_full():
    tensors = [unit(5, d, seed=s).requires_grad_() for s, d in enumerate((4, 4, 3, 3))]
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    affinity(tensors[0], tensors[1], scale, tensors[2], tensors[3], 11.0).mean().backward()
    assert scale.grad.abs() > 1e-4 and all(t.grad.abs().max() > 1e-3 for t in tensors[:2])
    assert all(t.grad is None for t in tensors[2:])
    halves = [t.detach().bfloat16() for t in tensors]
    exact = affinity(*(h.double() for h in halves[:2]), scale.detach(), *(h.double() for h in halves[2:]), 11.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = affinity(halves[0], halves[1], scale.detach().float(), halves[2], halves[3], 11.0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.fixture
def alone():
    """A group of this rank."""
    with process_group(1.0):
        yield


def write_clip(path, seed=3, **changes):
    """All weights of a CLIP as `sluice export` writes them."""
    torch.manual_seed(seed)
    own = {name: value for name, value in TEACHER.items() if name not in ("weights", "scale")}
    teacher = clip.CLIP(clip.Config(**own | changes), DataFacts((32, 32), ())).eval()
    save(path, teacher.state_dict(), {})
    return teacher


def data():
    return make_batch(build(), "distill_clip")


def test_a_teacher_from_a_file_says_what_the_clip_said(tmp_path, alone):
    path = tmp_path / "t.safetensors"
    teacher = write_clip(path)
    student = build({"only": TEACHER | {"weights": str(path)}}, affinity=2.0).train()
    fill(student)
    before, batch = weights_hash({"teachers": student.teachers}), data()
    with torch.no_grad():
        wanted = teacher.embed(batch, CTX)
    for name, value in student.taught(batch)["only"].items():
        torch.testing.assert_close(value, wanted[name])
    out = student(batch, CTX)
    out.loss.backward()
    assert weights_hash({"teachers": student.teachers}) == before
    parts = out.metrics
    torch.testing.assert_close(out.loss.detach(), 2 * parts["loss_affinity"] + 0.5 * parts["loss_contrast"])
    rows, scale = student.embed(batch, CTX), student.log_scale.exp()
    expected = affinity(rows["image"], rows["text"], scale, wanted["image"], wanted["text"], TEACHER["scale"])
    torch.testing.assert_close(parts["loss_affinity"], expected.detach().mean())


def test_several_teachers_are_averaged_after_the_softmax():
    both = build({"one": TEACHER, "other": TEACHER | {"scale": 5.0}}, contrast=0.0)
    batch = data()
    rows, scale = both.embed(batch, CTX), both.log_scale.exp()
    said = [its * rows[f"{name}.image"] @ rows[f"{name}.text"].T for name, its in (("one", 20.0), ("other", 5.0))]
    logits = scale * rows["image"] @ rows["text"].T
    expected = 0
    for mine, its in ((logits, said), (logits.T, [x.T for x in said])):
        mean = (its[0].softmax(dim=1) + its[1].softmax(dim=1)) / 2
        expected = expected - (mean * mine.log_softmax(dim=1)).sum(dim=1).mean() / 2
    torch.testing.assert_close(both(batch, CTX).loss, expected)


def stored_facts(**changes):
    told = Config(**STUDENT, teachers={"only": TEACHER}).teachers["only"].described((32, 32))
    return {"out": {"teacher": told | {"path": "x", "sha256": "abc"}, "outputs": {"image": 16, "text": 16}} | changes}


def test_stored_outputs_stand_in_for_the_teacher():
    live, student = build(), build({"only": TEACHER | {"stored": "out", "scale": 20.0}}, stored_facts())
    assert student.needs == live.needs | {"out_image": "float32[B,16]", "out_text": "float32[B,16]"}
    assert all(torch.equal(value, live.state_dict()[name]) for name, value in student.state_dict().items())
    batch = data()
    outputs = {f"out_{name}": value for name, value in live.taught(batch)["only"].items()}
    torch.testing.assert_close(student(batch | outputs, CTX).loss, live(batch, CTX).loss)
    halves = {name: value.half().float() for name, value in outputs.items()}
    torch.testing.assert_close(student(batch | halves, CTX).loss, live(batch, CTX).loss, rtol=1e-3, atol=0)
    with pytest.raises(
        ConfigError, match=r"teachers.only: the stored outputs 'out' hold features, not those of a CLIP"
    ):
        build({"only": TEACHER | {"stored": "out"}}, stored_facts(outputs={"features": 16}))
    with pytest.raises(ConfigError, match="of a teacher with text_depth = 2, not 3"):
        build({"only": TEACHER | {"stored": "out", "text_depth": 3}}, stored_facts())


def test_a_file_of_other_towers_is_named(tmp_path, alone):
    path = tmp_path / "t.safetensors"
    write_clip(path, text_depth=1)
    with pytest.raises(ConfigError, match=r"teachers.only: .*t.safetensors is not of these towers: 12 tensors differ"):
        fill(build({"only": TEACHER | {"weights": str(path)}}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"affinity": 0.0, "contrast": 0.0}, "nothing is learnt"),
        ({"teachers": {"a": TEACHER | {"length": 13}}}, "teachers.a: length = 13, and the student's is 12"),
        ({"teachers": {"keys": TEACHER}}, "cannot be called 'keys'"),
        ({"teachers": {}}, "teachers"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValidationError, match=said):
        Config(**{**STUDENT, "teachers": {"only": TEACHER}, **settings})
