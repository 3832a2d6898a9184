"""From the labels that a source finds to numbers of classes.

What a label means depends on where it was found. The name of a folder, or of a class in a manifest, is a name even if
it is made of digits. Digits in a table or a ``.cls`` member are the number of a class, unless the classes are known and
have such names. A label that is neither (-1, 0.5) is a rejected input; it never changes the numbers of the others.
"""

from __future__ import annotations

import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from data_prep import places
from data_prep.dataset import read_manifest
from data_prep.record import readable
from data_prep.store import open_store
from data_prep.text import json_table
from pipeline.core.classes import class_name, shown, unnamed
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE

_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", re.ASCII | re.IGNORECASE)
_LONGEST = 19
"""Digits that are read as a number: Python refuses to read thousands."""


class Label(NamedTuple):
    """What a source found."""

    text: str
    named: bool = True
    """It is the name of a class; otherwise it may also be the number of one."""


class Known(NamedTuple):
    """Classes that have their numbers already."""

    names: Sequence[str] = ()
    closed: bool = False
    """There are no others."""


NONE_KNOWN = Known()


def named(text: str) -> Label:
    """The label that is a name: of a folder, or in a list of classes."""
    return Label(class_name(readable(text)))


def cell_label(value: Any, names: Sequence[str] = ()) -> Label | str:
    """The label in a table's cell, or why there is none.

    Args:
        value: What the cell holds. A column of whole numbers with gaps comes as floats, and its gaps as NaN.
        names: Of the classes that the column's numbers count in, where the table says so.
    """
    if isinstance(value, (list, tuple, Mapping)):
        return f"a label is one value, not {type(value).__name__}: a sample belongs to one class"
    if isinstance(value, (float, Decimal)):
        if math.isnan(value):
            return "no label"
        value = int(value) if math.isfinite(value) and value == int(value) else value
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "replace")
    text = class_name(readable(str(value))) if value is not None else ""
    if not text:
        return "no label"
    return listed_label(text, names) if names else Label(text, named=False)


def listed_names(text: bytes, column: str) -> tuple[str, ...]:
    """The names of a column's classes in what Hugging Face's datasets note in Parquet files; empty without such."""
    feature: Any = json_table(text)[0]
    for key in ("info", "features", column):
        feature = feature.get(key) if isinstance(feature, dict) else None
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def listed_label(text: str, names: Sequence[str]) -> Label | str:
    """The label of a text, a class's number among ``names`` or its name; or why it is none."""
    number = _number(text)
    if number < len(names):
        return named(names[number])
    return named(text) if class_name(text) in map(class_name, names) else _strange(text, names)


def _strange(text: str, names: Sequence[str]) -> str:
    return f"label {text[:40]!r} is not one of {len(names)} classes"


def _number(text: str) -> int:
    """A number of a class; a very large one for what is none."""
    plain = text.isascii() and text.isdigit() and len(text) <= _LONGEST  # leading zeros do not make it small
    return int(text) if plain else 10**_LONGEST


class Classes:
    """The classes of a source, and the number of each label.

    Args:
        labels: All that occur.
        known: Classes that have their numbers already; others come after them.
        names: Names that the source itself lists, in order, whether or not a label has them.

    Raises:
        DataError: numbers that count in no list, or numbers among names.
    """

    def __init__(self, labels: Iterable[Label], known: Known = NONE_KNOWN, names: Sequence[str] = ()) -> None:
        labels = set(labels)
        self.names: tuple[str, ...] = tuple(known.names)
        self._closed = known.closed
        if not known.closed:
            _check_alike(known.names, names)
            self._add([*map(class_name, names), *sorted(label.text for label in labels if label.named)])
        words, digits = self._told_apart({label.text for label in labels if not label.named}, names)
        if not known.closed:
            self._take_in(words, digits)
        self._number = {named(name): i for i, name in reversed(list(enumerate(self.names)))}
        self._number |= {Label(t, False): i for t in words if (i := self._number.get(Label(t))) is not None}
        self._number |= {Label(t, False): _number(t) for t in digits if _number(t) < len(self.names)}

    def _add(self, names: Iterable[str]) -> None:
        """Number what is not there yet, in this order."""
        there = set(map(class_name, self.names))
        self.names = (*self.names, *(name for name in dict.fromkeys(names) if name not in there))

    def _told_apart(self, texts: set[str], names: Sequence[str]) -> tuple[set[str], set[str]]:
        """Those texts that are names, and those that are numbers; some are neither."""
        numerals = {text for text in texts if _NUMERAL.fullmatch(text)}
        digits = {text for text in numerals if text.isdigit()}
        by_name = self._named_by_digits(digits)
        words, numbers = (texts - numerals) | by_name, numerals - by_name
        digits -= by_name
        if self._closed:
            words &= set(map(class_name, self.names))
        if words and (digits or (numbers and not self._closed)):
            raise DataError(
                f"labels are numbers and names, {shown(sorted(numbers), 3)} and {shown(sorted(words), 3)}: "
                "say which classes there are with --classes FILE; what is none of them is rejected then"
            )
        if numbers and not (digits or words or self._closed):
            raise DataError(f"no label is the number of a class, which count from 0: {shown(sorted(numbers), 3)}")
        if digits and names and not unnamed(names) and not self._closed:
            raise DataError(
                f"some labels are names of classes ({shown(names, 3)}), others numbers ({shown(sorted(digits), 3)}) "
                "that count in no list: prepare the two apart, with --classes"
            )
        return words, digits

    def _named_by_digits(self, digits: set[str]) -> set[str]:
        """Those of the digits that are names of classes, not numbers."""
        found = set[str]() if unnamed(self.names) else digits & set(map(class_name, self.names))
        if found and digits - found:
            raise DataError(
                f"the classes are named by numbers that are not their places ({shown(self.names)}), and the labels "
                f"{shown(sorted(digits - found), 3)} are none of them: it cannot be told what "
                f"{shown(sorted(found), 3)} stands for"
            )
        return found

    def _take_in(self, words: set[str], digits: set[str]) -> None:
        """Number what is new in a text column: names in alphabetical order, numbers as they are."""
        if words:
            if self.names and unnamed(self.names):
                raise DataError(
                    f"the classes so far are only numbered, 0 to {len(self.names) - 1}, and {shown(sorted(words))} are "
                    "names: name the classes with `sluice prep index FOLDER --classes FILE`"
                )
            self._add(sorted(words))
        if digits and unnamed(self.names):
            most = max(map(_number, digits))
            check_classes(most, len(digits))
            self.names = (*self.names, *(str(i) for i in range(len(self.names), most + 1)))

    def look_up(self, label: Label | str | None) -> tuple[int | None, str]:
        """The number of a label's class, and what is wrong; neither of None, which stands for a sample without label.

        Args:
            label: A label, or why there is none.
        """
        if not isinstance(label, Label):
            return None, label or ""
        number = self._number.get(label)
        if number is not None:
            return number, ""
        if not label.named and _NUMERAL.fullmatch(label.text) and not label.text.isdigit():
            return None, f"label {label.text[:40]!r} is no number of a class"
        return None, _strange(label.text, self.names)


def _check_alike(known: Sequence[str], names: Sequence[str]) -> None:
    if known and names and unnamed(known) != unnamed(names):
        numbered, given = (known, names) if unnamed(known) else (names, known)
        raise DataError(
            f"classes that are only numbered (0 to {len(numbered) - 1}) do not go together with names "
            f"({shown(given, 3)}): name them with `sluice prep index FOLDER --classes FILE`"
        )


def check_kept(there: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Refuse to add data whose classes do not begin with those that are ``there``.

    Raises:
        ConfigError: a number would stand for another class.
    """
    for number, name in enumerate(there):
        now = classes[number] if number < len(classes) else "none"
        if name != now:
            raise ConfigError(
                f"{where} has {len(there)} classes that the source does not begin with: number {number} is {name!r} "
                f"there, {now!r} now; added data keeps the numbers of the classes"
            )


def check_classes(most: int, used: int) -> None:
    """Refuse labels up to ``most`` of which only ``used`` differ: a list of all classes would be endless.

    Raises:
        DataError: they are ids of something else.
    """
    if most > 100_000 + 10 * used:
        raise DataError(
            f"a label is {most}, but only {used} labels differ: these are no class numbers, which count from 0; "
            "take another column, or give names"
        )


def label_number(data: bytes) -> int | None:
    """The label that a ``.cls`` member holds; None where it is no class number, endless digits included."""
    digits = data.removeprefix(BOM_UTF8).strip()
    return int(digits) if digits.isdigit() and len(digits) < _LONGEST else None


def read_classes(place: str) -> tuple[str, ...]:
    """The classes that a file lists, one a line, or that a data set (its folder or manifest) has.

    Raises:
        ConfigError: no such file, or no list of names.
    """
    folder = place.removesuffix(f"/{FILE}")
    if folder != place or places.is_folder(place):
        store = open_store(folder)
        try:
            names = read_manifest(store).classes
        finally:
            store.close()
    else:
        try:
            with places.opened(place) as f:
                text = f.read().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the classes: {error}") from error
        names = tuple(line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n"))
    names = tuple(map(class_name, names))
    if not all(names) or len(set(names)) < len(names) or not names:
        strange = [name for i, name in enumerate(names) if not name or name in names[:i]]
        problem = f"{strange[0]!r} in line {names.index(strange[0]) + 1}" if strange else "nothing"
        raise ConfigError(f"{place} lists {problem}: classes have one name each, all different, and no empty lines")
    return names
