"""Digits set in type."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from data_prep.index import index
from data_prep.options import Options
from data_prep.sources.digits import DigitsSource
from data_prep.sources.glyphs import TYPEFACES
from data_prep.sources.typefaces import FAMILIES, TypefacesSource, counts_of, family_of
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import load
from tests.unit.data_prep.samples import members


def test_counts_are_those_of_a_bitmap_that_the_digit_fills():
    """As the handwritten ones: 0 to 16, from edge to edge in one direction; every typeface has all digits."""
    random_numbers = random.Random(0)
    for face in range(len(TYPEFACES)):
        for digit in (1, 8):
            counts = counts_of(digit, face, random_numbers)
            assert counts.shape == (8, 8) and counts.min() >= 0 and counts.max() <= 16 and counts.max() > 8
            rows, columns = counts.any(axis=1), counts.any(axis=0)
            assert (rows[0] and rows[-1]) or (columns[0] and columns[-1])
    assert counts_of(8, 0, random.Random(1)).sum() > 1.2 * counts_of(1, 0, random.Random(1)).sum()


def test_a_seed_gives_the_same_images_and_turns_and_slants_stay_within_their_limits():
    def images(seed: int) -> dict[str, bytes]:
        return {r.key: r.image.read() for r in TypefacesSource(digits=2, samples=1, seed=seed)}

    assert images(0) == images(0) and images(0).keys() == images(1).keys() and images(0) != images(1)
    # Over many draws the mean is upright: what is symmetric stays nearly so.
    mean = np.mean([counts_of(0, 0, random.Random(i)) for i in range(200)], axis=0)
    assert np.abs(mean - mean[:, ::-1]).max() < 3 and np.abs(mean - mean[::-1]).max() < 3


def test_typefaces_belong_to_families_that_metadata_names(tmp_path):
    source = TypefacesSource(digits=3, samples=2)
    records = list(source)
    assert len(records) == source.total == 3 * 2 * 21 and len({r.key for r in records}) == len(records)
    assert {r.metadata["family"] for r in records if r.metadata} == set(FAMILIES)
    assert family_of("DejaVuSansMono-Bold") == "dejavu_mono" and family_of("DejaVuSans-Bold") == "dejavu_sans"
    draws = [r.metadata["draw"] for r in records if r.metadata]
    assert min(draws) >= 0 and max(draws) < 1 and abs(np.mean(draws) - 0.5) < 0.1 and len(set(draws)) == len(draws)
    assert source.classes == DigitsSource().classes[:3]
    built = build(TypefacesSource(digits=1, samples=1), tmp_path, Options({"val": 0.2}, domain="type"))
    assert built.counts.samples == 21 and built.manifests["train"].classes == ("zero",)
    again = index(str(tmp_path / "train"))
    assert built.manifests["val"].domain == again.domain == "type"
    assert index(str(tmp_path / "train"), domain="print").domain == load(tmp_path / "train").domain == "print"
    content = members(tmp_path / "train")
    png = next(value for name, value in content.items() if name.endswith(".png"))
    assert Image.open(io.BytesIO(png)).size == (32, 32)


@pytest.mark.parametrize("wrong", [{"digits": 0}, {"digits": 11}, {"samples": 0}, {"size": 7}], ids=str)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ConfigError, match="typefaces: digits are 1 to 10"):
        TypefacesSource(**wrong)
