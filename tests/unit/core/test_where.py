"""--where: which rows are taken, compared with Python's own comparison."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ConfigError
from pipeline.core.where import Where

ROWS = [
    {"vendor": "a", "score": "0.7", "n": 1, "name": "Foo Bar", "ok": True},
    {"vendor": "b", "score": "10", "n": 2, "name": "foo", "ok": False},
    {"vendor": "c", "score": "", "n": None, "name": None, "ok": None},
]


def kept(text, rows=ROWS):
    where = Where(text)
    return [i for i, row in enumerate(rows) if where.keeps(row) is True]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('vendor in ("a", "b")', [0, 1]),
        ('vendor not in ["a"]', [1, 2]),
        ("vendor == 'c'", [2]),
        ('vendor != "c"', [0, 1]),
        ("score > 0.5", [0, 1]),
        ("score > 0.5 and score <= 9", [0]),
        ("0.5 < score < 9", [0]),
        ('score < 1 or vendor == "c"', [0, 2]),
        ('not (score < 1 or vendor == "c")', [1]),
        ("score in (10, 11)", [1]),
        ("n >= 2", [1]),
        ("n != 1", [1, 2]),
        ("n == -1", []),
        ("score == None", [2]),
        ("name != None", [0, 1]),
        ("n in (1, None)", [0, 2]),
        ('"oo B" in name', [0]),
        ('"foo" not in name', [0, 2]),
        ("ok == True", [0]),
        ("ok == False", [1]),
        ('`vendor` == "a"', [0]),
        ('name == "`vendor`"', []),
        ('n == "2"', [1]),
    ],
)
def test_conditions(text, wanted):
    assert kept(text) == wanted


def test_columns_with_odd_names():
    where = Where('`the vendor` == "a" and `a.b-c` > 1 and `the vendor` != "x"')
    assert where.columns == ("the vendor", "a.b-c")
    assert where.keeps({"the vendor": "a", "a.b-c": 2}) is True


def test_cells_of_text_tables_are_true_or_false():
    assert kept("x == True", [{"x": "true"}, {"x": "False"}, {"x": ""}]) == [0]


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ("score > 1", {"score": "n/a"}, "--where: 'n/a' is no number"),
        ("score == 1", {"score": "n/a"}, "--where: 'n/a' is no number"),
        ("score < 1", {"score": [1]}, "cannot be compared"),
        ("ok == True", {"ok": "maybe"}, "neither true nor false"),
        ("1 in n", {"n": 5}, "does not hold several values"),
    ],
)
def test_what_cannot_be_compared_is_said(text, row, reason):
    """And becomes a rejected row, neither taken nor left."""
    assert reason in Where(text).keeps(row)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("vendor = 'a'", "is written like"),
        ("", "is written like"),
        ("vendor ==", "is written like"),
        ("vendor", "compares nothing"),
        ("f(vendor) == 1", "malformed"),
        ("vendor.x == 1", "malformed"),
        ("vendor[0] == 1", "malformed"),
        ("score + 1 > 2", "malformed"),
        ("__import__('os')", "compares nothing"),
        ("vendor is None", "compare with"),
        ('vendor in ("a")', r"with commas: \('a',\)"),
        ('"a" == "b"', "no column"),
        ("(" * 500 + "a", "is written like"),
    ],
)
def test_conditions_that_are_none(text, reason):
    with pytest.raises(ConfigError, match=reason):
        Where(text)


@given(
    st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["<", "<=", "==", "!="])
)
def test_numbers_as_text_are_compared_as_numbers(value, op):
    for cell in (value, str(value)):
        wanted = eval(f"x {op} 7", {"x": float(value)})
        assert Where(f"x {op} 7").keeps({"x": cell}) is wanted


def test_empty_cells_are_neither_smaller_nor_larger():
    for cell in (None, "", math.nan):
        assert [kept(f"x {op} 0", [{"x": cell}]) for op in ("<", ">=", "==", "!=")] == [[], [], [], [0]]
    assert kept("x == None", [{}]) == [0]
