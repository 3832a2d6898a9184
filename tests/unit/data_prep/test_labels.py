"""Which class a label belongs to, wherever it was found."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, cell_label, listed_names, named, read_classes
from data_prep.options import Options
from pipeline.core.errors import ConfigError, DataError
from tests.unit.data_prep.samples import ListSource, inline

ANIMALS = ("cat", "dog", "eel")


def numbers(texts, known=NONE_KNOWN, names=()):
    """Classes, and what becomes of each text of a table."""
    found = Classes({Label(t, False) for t in texts}, known, names)
    return found.names, [found.look_up(Label(t, False))[0] for t in texts]


def test_numbers_stand_for_themselves_and_names_are_sorted():
    assert numbers(["0", "2", "10", "02"]) == (tuple(map(str, range(11))), [0, 2, 10, 2])
    assert numbers(["dog", "cat", "dog"]) == (("cat", "dog"), [1, 0, 1])
    assert numbers(["\u0661", "\u0662"]) == (("\u0661", "\u0662"), [0, 1]), "digits are those of ASCII, as in .cls"


@pytest.mark.parametrize("odd", ["-1", "0.00", "1.5", "1e3", "nan", "-inf", "+1", ".5"])
def test_what_is_no_number_of_a_class_never_renumbers_the_others(odd):
    classes, found = numbers(["0", "1", "2", "10", odd])
    assert (classes, found) == (tuple(map(str, range(11))), [0, 1, 2, 10, None])
    assert Classes({Label("0", False)}).look_up(Label(odd, False))[1] == f"label {odd!r} is no number of a class"
    with pytest.raises(DataError, match=f"no label is the number of a class.*: {odd.replace('+', '.')}"):
        numbers([odd])


@given(st.sets(st.integers(0, 99), min_size=1), st.lists(st.sampled_from(["-1", "0.5", "nan", "-7"])))
def test_numbers_keep_their_value_whatever_stands_beside_them(values, odd):
    texts = [str(v) for v in values] + odd
    classes, found = numbers(texts)
    assert classes == tuple(map(str, range(max(values) + 1))) and found == [*values, *[None] * len(odd)]


def test_a_mixture_of_numbers_and_names_is_refused():
    for texts in (["0", "1", "cat"], ["cat", "-1"]):
        with pytest.raises(DataError, match=r"labels are numbers and names, .* and cat: .*--classes FILE"):
            numbers(texts)
    closed = Known(ANIMALS, closed=True)
    assert numbers(["cat", "-1", "fox", "eel"], closed) == (ANIMALS, [0, None, None, 2])
    assert numbers(["0", "2", "unknown", "3"], closed) == (ANIMALS, [0, 2, None, None])
    with pytest.raises(DataError, match="numbers and names"):
        numbers(["0", "cat"], closed)


def test_names_made_of_digits_are_names():
    """Folders 1, 2, 10 and 11: class 0 is called "1"."""
    folders = Classes(map(named, ("1", "2", "10", "11")))
    assert folders.names == ("1", "10", "11", "2") and folders.look_up(named("2")) == (3, "")
    again = Classes(map(named, ("2", "3", "11")), Known(folders.names))
    assert again.names == ("1", "10", "11", "2", "3") and again.look_up(named("11")) == (2, "")
    assert numbers(["11", "2"], Known(folders.names)) == (folders.names, [2, 3]), "of a table, by the name"
    with pytest.raises(DataError, match=r"named by numbers that are not their places .*labels 0 are none of them"):
        numbers(["0", "1"], Known(folders.names))
    assert numbers(["001", "010"], Known(("001", "002", "010"), closed=True))[1] == [0, 2]


def test_what_is_added_comes_after_what_is_known():
    assert numbers(["ant", "yak"], Known(("zebra", "yak"))) == (("zebra", "yak", "ant"), [2, 1])
    assert numbers(["1", "5"], Known(("zebra", "yak"))) == (("zebra", "yak"), [1, None])
    assert numbers(["1", "3"], Known(("0", "1"))) == (tuple("0123"), [1, 3])
    with pytest.raises(DataError, match="only numbered, 0 to 1, and cat are names"):
        numbers(["cat"], Known(("0", "1")))
    assert Classes([named("cafe\u0301")], Known(("caf\u00e9",))).names == ("caf\u00e9",)


def test_a_list_is_taken_as_it_is():
    """In its order, with the classes that no sample has."""
    assert Classes([named("eel")], names=("eel", "dog", "cat")).names == ("eel", "dog", "cat")
    assert Classes([named("fox")], Known(ANIMALS, closed=True)).look_up(named("fox")) == (
        *(None, "label 'fox' is not one of 3 classes"),
    )
    for names in (("cat", "dog"), ("1", "2")):
        with pytest.raises(DataError, match=r"names of classes .* others numbers"):
            numbers(["0"], names=names)
    with pytest.raises(DataError, match="only numbered"):
        Classes((), Known(("0", "1")), names=ANIMALS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3"), (Decimal("2.00"), "2"), (True, "True"), (b"cat", "cat"), (" cat ", "cat"), (1.5, "1.5")],
)
def test_cells(value, text):
    assert cell_label(value) == Label(text, named=False)


def test_cells_without_a_label():
    for value in (None, "", "  ", float("nan"), Decimal("nan")):
        assert cell_label(value) == "no label"
    for value in ([0, 1], [], {"a": 1}, (3,)):
        assert "one value, not" in cell_label(value)
    assert cell_label(float("inf")) == Label("inf", named=False)


def test_numbers_that_count_in_a_list():
    assert cell_label(1, ANIMALS) == cell_label("dog", ANIMALS) == named("dog")
    for value in (3, -1, 1.5, "fox", "9" * 5000):
        assert "is not one of 3 classes" in cell_label(value, ANIMALS) and len(cell_label(value, ANIMALS)) < 90


def test_names_of_hugging_face():
    def text(label):
        return json.dumps({"info": {"features": {"label": label}}}).encode()

    assert listed_names(text({"names": ["no", "yes"], "_type": "ClassLabel"}), "label") == ("no", "yes")
    others = [{"dtype": "int64", "_type": "Value"}, {"feature": {"names": ["a"], "_type": "ClassLabel"}}, 3, None]
    assert {listed_names(text(other), "label") for other in others} == {()}
    assert {listed_names(odd, "label") for odd in (b"{}", b"no", b"[]", b'{"info": 3}')} == {()}
    assert listed_names(text({"names": ["no"], "_type": "ClassLabel"}), "other") == ()


def test_lists_in_files(tmp_path):
    path = tmp_path / "names.txt"
    for text in ("cat\ndog", "\ufeffcat\r\ndog\r\n\r\n", "cat \n\tdog\n\n"):
        path.write_text(text, encoding="utf-8", newline="")
        assert read_classes(str(path)) == ("cat", "dog")
    path.write_text("a\u2028b\ncafe\u0301\n", encoding="utf-8")
    assert read_classes(str(path)) == ("a\u2028b", "caf\u00e9")
    build(ListSource(inline(2), ANIMALS), tmp_path / "out", Options({}))
    assert read_classes(f"{tmp_path}/out/train") == read_classes(f"{tmp_path}/out/train/manifest.json") == ANIMALS


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "lists '' in line 1"),
        (b"cat\n\ndog", "lists '' in line 2"),
        (b"cat\ndog\ncat", "lists 'cat' in line 1"),
        ("caf\u00e9\ncafe\u0301".encode(), "lists 'caf\u00e9' in line 1"),
        (b"\xff\xfec\0", "cannot read the classes"),
        (None, "cannot read the classes"),
    ],
)
def test_lists_that_are_none(tmp_path, content, reason):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_classes(str(path))
