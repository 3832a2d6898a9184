"""Classes go by their names."""

import pytest

from pipeline.core.classes import class_name, numbers_in, shown, union, unnamed
from pipeline.core.errors import DataError

COMPOSED, APART = "caf\u00e9", "cafe\u0301"


def test_one_name_has_one_form():
    assert class_name(APART) == class_name(f" {COMPOSED}\n") == COMPOSED
    assert class_name("Cat") != class_name("cat") and class_name("\u00b2") == "\u00b2", "other letters stay apart"


def test_numbers_by_name():
    assert numbers_in(("eel", "cat", APART), ("cat", "dog", COMPOSED, "eel")) == [3, 0, 2]
    assert numbers_in(("fox", "cat"), ("cat",)) == [None, 0]
    for one, other in ((("crane", "crane"), ("x",)), (("x",), (COMPOSED, APART))):
        with pytest.raises(DataError, match="several classes have one name"):
            numbers_in(one, other)


def test_union_keeps_the_numbers_of_the_first():
    lists = [("a", ("cat", "dog")), ("b", ()), ("c", ("eel", "dog", APART)), ("d", (COMPOSED, "ant"))]
    assert union(lists) == ("cat", "dog", "eel", APART, "ant")
    assert union([("a", tuple("012")), ("b", tuple("01234"))]) == tuple("01234")
    assert union([]) == ()


@pytest.mark.parametrize("order", [1, -1])
def test_names_and_mere_numbers_do_not_mix(order):
    lists = [("shards/a", ("cat", "dog")), ("shards/b", ("0", "1"))]
    with pytest.raises(DataError, match=r"of shards/b are only numbered, those of shards/a have names.*index shards/b"):
        union(lists[::order])


def test_what_counts_as_unnamed():
    assert unnamed(()) and unnamed(("0", "1"))
    assert not unnamed(("1", "2")) and not unnamed(("1", "10", "11", "2")) and not unnamed(("00", "01"))


def test_names_in_messages_are_short_and_visible():
    text = shown(["x" * 99, "a\nb", "", *"cdefgh"], 4)
    assert text == f"{'x' * 40}..., 'a\\nb', '', c and 5 more"
