import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.record.formats import decimals, duration, short, with_error


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 4, "0"),
        (0.43125, 4, "0.4313"),
        (1500, 4, "1500"),
        (9999.96, 4, "10k"),
        (12_800_000, 4, "12.8M"),
        (-2.5e9, 4, "-2.5G"),
        (999.7, 3, "1k"),
        (1234, 3, "1.23k"),
        (0.00015, 4, "1.5e-4"),
        (2e-10, 4, "2e-10"),
        (math.inf, 4, "inf"),
        (math.nan, 4, "nan"),
    ],
)
def test_short(value, digits, text):
    assert short(value, digits) == text


@given(st.floats(1e-12, 1e14), st.integers(3, 5))
def test_short_is_short_and_right(value, digits):
    text = short(value, digits)
    assert len(text) <= digits + 5
    factor = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}.get(text[-1], 1)
    assert float(text.rstrip("TGMk")) * factor == pytest.approx(value, rel=10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (7, "7 s"), (59.6, "1 m"), (725, "12 m 5 s"), (3605, "1 h"), (93_600, "1 d 2 h"), (-3, "0 s")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "errors", "places"),
    [
        ([0.7541], [0.0061, 0.013], 4),
        ([17.9], [0.31], 2),
        ([5000.0], [120.0], 0),
        ([0.7541], [], 4),
        ([98.123], [], 2),
        ([0.0], [], 0),
        ([math.nan], [math.nan], 0),
        ([0.5], [0.0], 4),
    ],
)
def test_decimals(values, errors, places):
    assert decimals(values, errors) == places


def test_with_error():
    assert with_error(0.75412, 0.0061, 4) == "0.7541 +- 0.0061"
    assert with_error(0.75412, None, 2) == "0.75"
