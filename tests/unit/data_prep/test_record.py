"""Keys and splits."""

from pathlib import PurePosixPath

import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.record import KEY_LENGTH, safe_key, split_of

PATHS = st.text(max_size=120) | st.lists(st.sampled_from(["..", ".", "a", "b.c", "", "%2E", "~"])).map("/".join)


@given(PATHS)
@example("../../etc/passwd")
@example("/absolute")
@example("a.b.c/d.jpg")
@example("")
@example("\udcff")
def test_keys_stay_inside_and_hold_no_dot(text):
    key = safe_key(text)
    path = PurePosixPath(key)
    assert key and not path.is_absolute() and ".." not in path.parts and "." not in key and "//" not in key
    assert key.isascii() and len(key) <= KEY_LENGTH
    prefix, extension = webdataset.tariterators.base_plus_ext(f"{key}.jpg")
    assert (prefix, extension) == (key, "jpg")


@given(PATHS, PATHS)
@example("a/b", "a//b")
@example("a.b", "a%2Eb")
@example("a", "/a")
@example("x" * 100, "x" * 101)
def test_different_names_have_different_keys(one, other):
    assert (safe_key(one) == safe_key(other)) == (one == other)


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_have_their_parts(seed):
    splits = [split_of(f"{i}", {"val": 0.1, "test": 0.2}, seed) for i in range(5000)]
    # three standard deviations of a binomial count are below 85
    assert abs(splits.count("val") - 500) < 70 and abs(splits.count("test") - 1000) < 90
    assert splits != [split_of(f"{i}", {"val": 0.1, "test": 0.2}, seed + 5) for i in range(5000)]
