"""Stored outputs of teachers: what comes back is what was stored, and other crops than the teacher saw are refused."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from pipeline.config.schema import Captions, Data, Image
from pipeline.core.errors import ConfigError
from pipeline.data.field import Sample, make_fields
from pipeline.data.outputs import MEMBER, Layout, facts_of, hold, plain
from tests.unit.data.shards import write_data
from tests.unit.data.wide import AUGMENTATIONS, outputs_of, wide_data, with_outputs, write_wide


def draw(*shape, seed=0, scale=3.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 2**-11)])
def test_all_outputs_come_back(dtype, error):
    layout = Layout({"features": 5, "logits": 7})
    given = {"logits": draw(4, 7), "features": draw(4, 5, seed=1)}
    rows, classes = layout.pack(given, dtype)
    assert rows.shape == (4, layout.width) == (4, 12) and rows.dtype == dtype and classes is None
    for number, row in enumerate(rows):
        found = layout.unpack(row, None)
        assert list(found) == ["features", "logits"]
        for name, values in found.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, given[name][number], rtol=error, atol=0)


def softmax(row):
    total = math.fsum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_of_the_top_logits_probabilities_are_exact_and_the_others_share_what_is_left():
    layout, logits = Layout({"features": 2, "logits": 9}, top=3), draw(4, 9)
    rows, classes = layout.pack({"features": draw(4, 2), "logits": logits}, "float32")
    assert rows.shape == (4, 2 + 3 + 1) and classes.shape == (4, 3)
    for row, own, whole in zip(rows, classes, logits.tolist(), strict=True):
        wanted, found = softmax(whole), softmax(layout.unpack(row, own)["logits"].tolist())
        best = sorted(range(9), key=lambda c: -whole[c])[:3]
        assert own.tolist() == best
        left = 1 - sum(wanted[c] for c in best)
        assert found == pytest.approx([wanted[c] if c in best else left / 6 for c in range(9)], rel=1e-5)


def test_a_sample_has_the_row_of_its_augmentation(tmp_path):
    manifest = write_wide(tmp_path, [2])
    data = wide_data(manifest, ("big",), {"big": {"name": "stored", "sidecar": "teacher"}})
    field = make_fields(with_outputs(manifest, data), data, 3, lambda: b"")["big"]
    members = outputs_of(1)
    rows = np.load(io.BytesIO(members[f"teacher:{MEMBER}"]))
    assert len(rows) == AUGMENTATIONS == 2 and not np.isclose(rows[0, :3], rows[1, :3]).any()
    for epoch, drawn in zip(range(5), field.draw(torch.arange(5), torch.ones(5, dtype=torch.int64)), strict=True):
        arrays = {name: np.zeros((1, *column.shape), column.dtype) for name, column in field.columns.items()}
        field.decode(Sample({name: memoryview(content) for name, content in members.items()}), drawn, arrays, 0)
        np.testing.assert_array_equal(arrays["big_features"][0], rows[epoch % 2, :3].astype(np.float32))


def test_what_does_not_fit_is_said():
    layout = Layout({"features": 2})
    with pytest.raises(ConfigError, match="the teacher's features reach 70000, too large for float16; store float32"):
        layout.pack({"features": np.float32([[1, -7e4]])}, "float16")
    with pytest.raises(ConfigError, match="which no student can follow"):
        layout.pack({"features": np.float32([[1, math.nan]])}, "float32")


IMAGE = Image(size=8, scale=(0.5, 1.0))
FACTS = {"augmentations": 4, "augmentation_seed": 2, "image": plain(IMAGE), "captions": None}


def held(facts=FACTS, **settings):
    hold(
        Data(train="x", **{"image": IMAGE, "augmentations": 4, "augmentation_seed": 2} | settings),
        facts,
        "data.field.t",
    )


def test_the_same_crops_are_taken_and_fewer_of_them():
    held()
    held(augmentations=2)
    whole = Image(size=8, crop="center")
    held(FACTS | {"image": plain(whole), "augmentations": 1, "augmentation_seed": 0}, image=whole, augmentations=None,
         augmentation_seed=0)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"augmentations": None, "augmentation_seed": 0}, r"data.field.t: .* set data.augmentations = 4"),
        ({"augmentations": 5}, "of 4 augmentations are stored, fewer than data.augmentations = 5"),
        ({"augmentation_seed": 1}, "of data.augmentation_seed = 2, not 1"),
        ({"image": Image(size=8, scale=(0.4, 1.0))}, r"data.image.scale = \[0.5, 1.0\], not \[0.4, 1.0\]"),
        ({"image": Image(size=9, scale=(0.5, 1.0))}, "data.image.size = 8, not 9"),
    ],
)
def test_other_crops_than_the_teacher_saw_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        held(**settings)


def test_other_captions_are_refused():
    captions = Captions().model_dump(mode="json", exclude={"tokenizer"})
    held(FACTS | {"captions": captions})
    with pytest.raises(ConfigError, match="other data\\.captions"):
        held(FACTS | {"captions": captions}, captions=Captions(length=9))


def test_outputs_that_are_not_there_are_named(tmp_path):
    manifest = write_data(tmp_path, [2])
    with pytest.raises(ConfigError, match=r"data.field.t: there is no \[data.sidecar.t\]"):
        facts_of(manifest, "t", "data.field.t")
