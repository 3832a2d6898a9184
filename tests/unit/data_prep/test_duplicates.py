"""Duplicates, against a search through all pairs."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from data_prep.build import build
from data_prep.duplicates import Seen, perceptual_hash
from data_prep.options import Duplicates, Options
from data_prep.record import Inline, Record
from tests.unit.data_prep.samples import ListSource, encoded, members, opened, picture


def bits(one, other):
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


@given(
    st.lists(st.lists(st.integers(0, 63), max_size=12), max_size=12),
    st.integers(0, 9),
    st.randoms(use_true_random=False),
)
def test_near_search_finds_what_all_pairs_find(flips, distance, random):
    base = random.getrandbits(64)
    values = [base]
    for places in flips:
        value = random.choice(values)
        for place in places:
            value ^= 1 << place
        values.append(value)
    seen = Seen(Duplicates("drop", distance))
    for i, value in enumerate(values):
        prints = (b"%d" % i, b"p%d" % i, value.to_bytes(8, "big"))
        near = [(bin(value ^ other).count("1"), j) for j, other in enumerate(values[:i])]
        near = [pair for pair in near if pair[0] <= distance]
        found = seen.like(prints, i)
        assert (found is None) == (not near)
        if near:
            assert found.endswith(f"{min(near)[0]} of 64 bits differ) of s{min(near)[1]}")
        seen.add(prints, i, f"s{i}")


@pytest.mark.parametrize("distance", range(16))
def test_bits_that_differ_are_found_however_they_are_spread(distance):
    """Evenly, they spoil as many pieces of the hash as they can."""
    seen = Seen(Duplicates("drop", distance))
    seen.add((b"a", b"b", bytes(8)), 0, "zero")
    for count in range(1, distance + 3):
        value = sum(1 << 64 * i // count for i in range(count))
        found = seen.like((b"c", b"d", value.to_bytes(8, "big")), 1)
        assert found == (f"duplicate (looks alike, {count} of 64 bits differ) of zero" if count <= distance else None)


def test_later_samples_do_not_count():
    seen = Seen(Duplicates("drop", 0))
    seen.add((b"a", b"b", bytes(8)), 7, "seven")
    assert seen.like((b"a", b"b", bytes(8)), 3) is None
    assert "seven" in seen.like((b"a", b"x", bytes(8)), 8)
    seen.add((b"a", b"b", bytes(8)), 5, "five")
    assert "five" in seen.like((b"a", b"x", bytes(8)), 8)
    seen.add((b"a", b"b", bytes(8)), 6, "six")
    for place in (6, 8):
        assert seen.like((b"a", b"b", bytes(8)), place) == "duplicate (bytes) of five", "the first of all"


def test_perceptual_hash_knows_an_image_again():
    pictures = [picture(i, (96, 72)) for i in range(12)]
    hashes = [perceptual_hash(p) for p in pictures]
    apart = min(bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i])
    assert apart > 12
    for image, first in zip(pictures, hashes, strict=True):
        smaller = opened(encoded(image.resize((60, 50), Image.Resampling.BICUBIC), "JPEG", quality=70))
        brighter = image.point(lambda v: min(255, int(v * 0.9 + 20)))
        assert bits(first, perceptual_hash(smaller)) <= 6
        assert bits(first, perceptual_hash(brighter)) <= 6


def test_perceptual_hash_is_the_published_one():
    """The signs of the lowest 8 x 8 coefficients of a DCT-II, by scipy's, against their median."""
    for seed in range(6):
        image = picture(seed, (40, 64))
        small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=2.0), float)
        low = dctn(small, 2)[:8, :8].ravel()
        signs = "".join("1" if value > np.median(low) else "0" for value in low)
        assert signs.count("1") == 32 and int.from_bytes(perceptual_hash(image), "big") == int(signs, 2)


def records():
    image = picture(1, (96, 72))
    same_pixels = encoded(image, "PNG", compress_level=1)
    near = encoded(image.resize((80, 60)), "JPEG", quality=80)
    contents = [encoded(image), encoded(picture(2)), encoded(image), same_pixels, near, encoded(picture(3))]
    return ListSource([Record(f"{i}", f"{i}", Inline(data)) for i, data in enumerate(contents)])


@pytest.mark.parametrize(("distance", "kept"), [(-1, "0145"), (8, "015")])
def test_drop(tmp_path, distance, kept):
    build(records(), tmp_path, Options({}, duplicates=Duplicates("drop", distance)))
    assert "".join(sorted({name[0] for name in members(tmp_path / "train")})) == kept
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert reasons[:2] == ["duplicate (bytes) of 0", "duplicate (pixels) of 0"]
    assert len(reasons) == 6 - len(kept)


def test_report_keeps_them(tmp_path):
    built = build(records(), tmp_path, Options({}, duplicates=Duplicates("report", 8)))
    assert built.counts.samples == 6 and (tmp_path / "rejects.jsonl").read_text() == ""
    lines = [json.loads(line) for line in (tmp_path / "duplicates.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == [2, 3, 4]
    assert "looks alike" in lines[2]["reason"]


def test_hash_of_a_flat_image():
    assert perceptual_hash(Image.fromarray(np.full((8, 8), 7, np.uint8))) == perceptual_hash(Image.new("L", (9, 9), 7))
