"""Scenes of glyphs: masks that are exact, typefaces that are held out."""

import numpy as np
import pytest

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources import scenes
from data_prep.sources.glyphs import TYPEFACES
from data_prep.sources.scenes import ScenesSource
from pipeline.core.errors import ConfigError
from pipeline.data.evaluation import open_eval
from tests.unit.data_prep.samples import opened, tree


def arrays(record):
    return np.asarray(opened(record.image.read())), np.asarray(opened(record.more["mask.png"]))


def test_scenes_are_the_same_every_time_and_differ_by_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(ScenesSource(characters=3, train=3, val=2, seed=seed), tmp_path / name, Options())
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


def test_a_pixel_is_of_what_covers_it(monkeypatch):
    """With black ink on white ground and one character, dark pixels are those of the mask."""
    monkeypatch.setattr(scenes, "_ground", lambda r, size: np.full((size, size, 3), 255, np.float32))
    monkeypatch.setattr(scenes, "_ink", lambda r, middle: [0, 0, 0])
    source = ScenesSource(characters=5, train=12, val=0, most=1)
    found = set()
    for record in source:
        image, mask = arrays(record)
        assert image.shape == (64, 64, 3) and np.array_equal(image[..., 0] < 128, mask > 0)
        (kind,) = set(np.unique(mask)) - {0}
        assert record.caption == f"a scene of {source.classes[kind]}" and source.classes[0] == "background"
        found.add(kind)
    assert len(found) > 2


def test_the_topmost_has_the_pixel(monkeypatch):
    """Each character in an ink of its own, without smooth edges: the ink tells the class."""
    monkeypatch.setattr(scenes, "_ground", lambda r, size: np.full((size, size, 3), 255, np.float32))
    inks = iter(np.repeat(np.arange(200)[:, None], 3, axis=1).tolist())
    monkeypatch.setattr(scenes, "_ink", lambda r, middle: next(inks))
    kept = ScenesSource._placed
    monkeypatch.setattr(ScenesSource, "_placed", lambda *a: kept(*a).point(lambda v: 255 if v >= 128 else 0))
    source, first = ScenesSource(characters=8, train=10, val=0, most=6), 0
    for record in source:
        image, mask = arrays(record)
        names = record.caption.removeprefix("a scene of ").split(", ")
        for place, name in enumerate(names):
            own = image[..., 0] == first + place
            assert (mask[own] == source.classes.index(name)).all()
        assert ((image[..., 0] == 255) == (mask == 0)).all()
        first += len(names)
    assert first > 20


def test_val_shows_typefaces_that_train_does_not(monkeypatch):
    used = {True: set(), False: set()}
    kept = ScenesSource._placed

    def placed(self, r, face, character):
        used[TYPEFACES[face].held_out].add(splits[-1])
        return kept(self, r, face, character)

    monkeypatch.setattr(ScenesSource, "_placed", placed)
    splits = ["train"]
    for record in (records := iter(ScenesSource(characters=4, train=4, val=4))):
        assert record.split == splits[-1]
        if record.key == "train-000003":
            splits.append("val")
            assert next(records).split == "val"
    assert used == {True: {"val"}, False: {"train"}}


def test_they_are_read_with_their_masks(tmp_path):
    from pipeline.config.schema import Image

    build(ScenesSource(characters=3, train=4, val=3, size=32), tmp_path, Options())
    stream = open_eval(tmp_path / "val", Image(size=32, crop="resize"), ("image", "mask"), batch=2, workers=0)
    assert stream.classes == ScenesSource(characters=3).classes
    masks = np.concatenate([batch["mask"].numpy() for batch in stream])
    records = {r.key: r for r in ScenesSource(characters=3, train=4, val=3, size=32)}
    for i, mask in enumerate(masks):
        assert np.array_equal(mask, arrays(records[f"val-{i:06d}"])[1])
    stream.close()


def test_impossible_scenes_are_refused():
    for wrong in ({"characters": 0}, {"characters": 256}, {"train": 0}, {"most": 0}, {"size": 8}, {"val": -1}):
        with pytest.raises(ConfigError, match="scenes"):
            ScenesSource(**wrong)
