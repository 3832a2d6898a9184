"""The embedded data: glyphs and digits."""

import unicodedata

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.digits import DigitsSource
from data_prep.sources.glyphs import TYPEFACES, GlyphsSource, alphabet, has
from pipeline.core.errors import ConfigError
from tests.unit.data_prep.samples import members, opened, tree


def test_glyphs_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        build(GlyphsSource(characters=4, samples=2), tmp_path / name, Options())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    build(GlyphsSource(characters=4, samples=2, seed=1), tmp_path / "c", Options())
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_glyphs_hold_out_typefaces(tmp_path):
    source = GlyphsSource(characters=6, samples=1, size=64)
    built = build(source, tmp_path, Options(shard_samples=50))
    faces = {s: {k.split("-")[1] for k in members(tmp_path / s)} for s in ("train", "val")}
    assert not faces["train"] & faces["val"]
    assert faces["val"] == {f"{i:02d}" for i, t in enumerate(TYPEFACES) if t.held_out}
    assert source.total == built.counts.samples
    for manifest in built.manifests.values():
        assert len(manifest.classes) == 6 and len(manifest.statistics["labels"]) == 6
        assert manifest.statistics["measures"]["width"]["min"] == 64


def test_glyphs_have_captions_and_visible_ink():
    for record in GlyphsSource(characters=12, samples=1):
        key = record.key.split("-")
        character, typeface = chr(int(key[0], 16)), TYPEFACES[int(key[1])]
        assert record.caption.split(" ", 1) == [
            "an" if typeface.style[0] == "i" else "a",
            f"{typeface.style} {unicodedata.name(character)}",
        ]
        pixels = np.asarray(opened(record.image.read()).convert("L"), float)
        assert np.ptp(pixels) > 40, "ink and paper differ"


def test_each_seed_has_an_order_and_pixels_of_its_own():
    drawn = []
    for seed in range(2):
        source = GlyphsSource(characters=2, samples=2, seed=seed)
        records = list(source)
        assert len({r.label for r in records[:12]}) == 2, "mixed, so that a shard holds many classes"
        drawn.append((source.describe(), [r.key for r in records], {r.key: r.image.read() for r in records}))
    (one, order, pixels), (other, another, others) = drawn
    assert one != other and order != another and set(order) == set(another)
    assert all(pixels[key] != others[key] for key in order)


def test_without_variation_glyphs_are_black_on_white():
    for record in list(GlyphsSource(characters=3, samples=1, variation=0))[:20]:
        pixels = np.asarray(opened(record.image.read()))
        assert (pixels == pixels[..., :1]).all() and pixels.min() < 30
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), "paper in the corners"


def test_the_alphabet_is_large_and_covered():
    several_hundred = alphabet(400)
    assert len(several_hundred) == len(set(several_hundred)) == 400
    assert several_hundred[:50] == alphabet(50)
    for character in several_hundred[::20]:
        faces = [t for t in TYPEFACES if has(t, character)]
        assert any(t.held_out for t in faces) and len(faces) >= 8
    # look-alikes of other scripts stay out
    assert not {"\N{GREEK CAPITAL LETTER ALPHA}", "\N{CYRILLIC CAPITAL LETTER A}"} & set(several_hundred)
    # so do small letters that are their capitals in small
    assert not set("wz") & set(several_hundred) and set("WZ") <= set(several_hundred)
    # nor is there what is but a speck
    assert not set(".,'`\u00b7") & set(several_hundred)
    # the TeX fonts draw another sign at "<"
    assert not has(TYPEFACES[-1], "<") and has(TYPEFACES[-1], "A")


def test_impossible_glyphs_are_refused():
    for wrong in (
        {"characters": 10_000},
        {"characters": 0},
        {"samples": 0},
        {"size": 4},
        {"variation": 1.1},
        {"variation": -0.1},
    ):
        with pytest.raises(ConfigError):
            GlyphsSource(**wrong)


def test_digits_are_those_of_scikit_learn():
    """Sixteen shades; the darkest is 255."""
    digits = load_digits()
    source = DigitsSource(size=8, limit=40)
    records = list(source)
    assert source.total == len(records) == 40 and DigitsSource(limit=5000).total == len(digits.target) == 1797
    for i, record in enumerate(records):
        pixels = np.asarray(opened(record.image.read()))
        np.testing.assert_allclose(pixels / 255, digits.images[i] / 16, atol=0.5 / 255)
        assert record.label == digits.target[i]
    assert len({str(DigitsSource(size, limit).describe()) for size in (8, 9) for limit in (1, 2)}) == 4
    for wrong in ({"size": 7}, {"limit": 0}, {"held_out": -1}, {"held_out": 40, "limit": 40}):
        with pytest.raises(ConfigError):
            DigitsSource(**wrong)


def test_held_out_digits_are_as_many_as_asked_for_and_stay_held_out_when_more_are():
    splits = {n: {r.key: r.split for r in DigitsSource(size=8, limit=100, held_out=n)} for n in (0, 30, 50)}
    assert set(splits[0].values()) == {None}
    held_out = {n: {key for key, split in splits[n].items() if split == "val"} for n in (30, 50)}
    assert [len(keys) for keys in held_out.values()] == [30, 50] and held_out[30] < held_out[50]
    assert set(splits[30].values()) == {"train", "val"}
    labels = {r.key: r.label for r in DigitsSource(size=8, limit=100)}
    assert len({labels[key] for key in held_out[30]}) > 5, "by a hash of the key, not by the class"
    assert DigitsSource(held_out=30).describe() != DigitsSource().describe()


def test_digits(tmp_path):
    built = build(DigitsSource(size=16, limit=60), tmp_path, Options({"val": 0.2}))
    assert built.counts.samples == 60 and built.manifests["train"].classes[3] == "three"
    content = members(tmp_path / "train")
    key = next(iter(content)).split(".")[0]
    assert content[f"{key}.txt"].decode().split()[-1] == built.manifests["train"].classes[int(content[f"{key}.cls"])]
    assert opened(content[f"{key}.png"]).size == (16, 16)
