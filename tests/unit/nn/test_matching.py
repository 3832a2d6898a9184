"""Which tensor goes where: every name by a plain rule, every resampled table by torch's own interpolation."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional

from pipeline.core.errors import CheckpointError
from pipeline.engine.fragments import named_tensors
from pipeline.nn.matching import backbones, match, pair
from tests.contracts.components import build_objective

ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = {"encoder": "vit_tiny_patch16_224", "encoder_args": ARGS}


def vit(size=32, **more):
    """A timm model as others have trained it, with a classifier."""
    torch.manual_seed(5)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=9, **ARGS | more).state_dict()


def found(objective, theirs, parts=None, skip=(), grid=None):
    prefixes = backbones(objective, objective.encoders().values())
    return match(named_tensors(objective), theirs, parts or pair(prefixes, theirs), skip, prefixes, grid, "there")


@pytest.mark.parametrize("name", ["mae", "supervised", "clip"])
def test_a_backbone_is_found_wherever_it_is(name):
    """In timm's layout, below another prefix, and in an objective of another kind."""
    objective = build_objective(name)
    ours = {"mae": "encoder.", "supervised": "encoder.backbone.", "clip": "image.encoder.backbone."}[name]
    backbone = {
        n.removeprefix(ours): torch.rand(t.shape) for n, t in objective.state_dict().items() if n.startswith(ours)
    }
    assert backbone
    for there in ("", "visual.trunk.", "encoder.backbone.", "encoder.", "image.encoder.backbone."):
        theirs = {there + n: t for n, t in backbone.items()} | {"decoder_blocks.0.x": torch.ones(1)}
        seen = found(objective, theirs)
        assert seen.values.keys() == {ours + n for n in backbone}
        assert all(seen.values[ours + n] is t for n, t in backbone.items())
        assert seen.missing == [n for n in named_tensors(objective) if not n.startswith(ours)]
        assert seen.unexpected == ["decoder_blocks.0.x"] and not seen.resized and not seen.own


def test_of_the_same_objective_all_is_taken():
    one, other = build_objective("clip"), build_objective("clip")
    theirs = {n: t + 1 for n, t in named_tensors(one).items()}
    seen = found(other, theirs)
    assert seen.values.keys() == theirs.keys() and not seen.missing and not seen.unexpected


def test_what_is_skipped_stays():
    one, other = build_objective("supervised"), build_objective("supervised")
    seen = found(other, dict(named_tensors(one)), skip=("head.",))
    assert seen.skipped == ["head.weight", "head.bias"] and not seen.unexpected and "head.weight" not in seen.values


def test_parts_are_named():
    one, other = build_objective("clip"), build_objective("clip")
    theirs = {f"student.{n}": t for n, t in named_tensors(one).items()}
    seen = found(other, theirs, parts={"text.": "student.text."})
    assert seen.values.keys() == {n for n in named_tensors(other) if n.startswith("text.")}
    assert seen.values["text.norm.weight"] is theirs["student.text.norm.weight"]


@pytest.mark.parametrize(("size", "grid"), [(64, None), (64, (8, 8)), ((16, 96), (2, 12))])
def test_position_tables_are_resampled(size, grid):
    objective = build_objective("supervised", **TINY)  # 32 x 32 pixels in patches of 8
    theirs = vit(size)
    seen = found(objective, theirs, grid=grid)
    rows, columns = grid or (8, 8)
    table = theirs["pos_embed"]
    cells = table[:, 1:].reshape(1, rows, columns, 16).permute(0, 3, 1, 2)
    small = functional.interpolate(cells, size=(4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    expected = torch.cat([table[:, :1], small], dim=1)
    torch.testing.assert_close(seen.values["encoder.backbone.pos_embed"], expected)
    assert seen.resized == ["encoder.backbone.pos_embed"]
    assert seen.missing == ["head.weight", "head.bias"] and seen.unexpected == ["head.weight", "head.bias"]


def test_a_table_that_is_computed_is_computed_anew():
    objective = build_objective("mae")
    theirs = {n: t for n, t in named_tensors(objective).items()}
    theirs["encoder.pos_embed"] = torch.rand(1, 5, theirs["encoder.pos_embed"].shape[2])
    seen = found(objective, theirs)
    assert seen.own == ["encoder.pos_embed"] and "encoder.pos_embed" not in seen.values


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            lambda: vit(depth=3),
            "another backbone than encoder.backbone, a Vision.*: 0 .* 12 are not expected",
        ),
        (lambda: vit(depth=1), r"12 tensors are missing \(blocks.1.norm1.weight"),
        (lambda: vit(embed_dim=24), r"cls_token is \[1, 1, 24\] there and \[1, 1, 16\] here"),
        (lambda: timm.create_model("resnet10t").state_dict(), "nothing in there fits this model"),
        (lambda: vit(size=(16, 96)), r"pos_embed is \[1, 25, 16\] there"),
    ],
    ids=["deeper", "shallower", "wider", "another", "not square"],
)
def test_another_backbone_is_refused(theirs, said):
    with pytest.raises(CheckpointError, match=said):
        found(build_objective("supervised", **TINY), theirs())


def test_of_two_equal_backbones_that_of_the_same_name_is_taken():
    objective = build_objective("supervised", **TINY)
    own = {n: t for n, t in named_tensors(objective).items() if n.startswith("encoder.")}
    twice = {f"average.{n}": t + 1 for n, t in own.items()} | own
    seen = found(objective, twice)
    assert seen.values.keys() == own.keys() and all(seen.values[n] is t for n, t in own.items())


def test_of_equal_encoders_the_one_that_is_evaluated_is_meant():
    """A student and its teacher have the same names below; a classifier begins as the teacher."""
    objective, taught = build_objective("supervised"), build_objective("dino")
    ours = {"encoder.backbone.": objective.encoder.backbone}
    names = [*(f"encoder.backbone.{n}" for n in objective.encoder.backbone.state_dict()), "head.weight"]
    names += [f"teacher.{name}" for name in names]
    assert pair(ours, names) == {}
    evaluated = list(backbones(taught, taught.encoders().values()))
    assert pair(ours, names, evaluated) == {"encoder.backbone.": "teacher.encoder.backbone."}
