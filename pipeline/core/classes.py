"""Names of classes: which of them are the same, and how the numbers of one list become those of another.

A label is a number, and means something only with the list of names that it counts in (``Manifest.classes``). Whatever
brings two data sets together goes by the names. No torch here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.core.errors import DataError

_SHOWN = 40
"""Letters of a name in a message."""


def class_name(text: str) -> str:
    """The one form of a name: accents composed with their letters (Unicode's NFC), no blanks at its ends."""
    return unicodedata.normalize("NFC", text).strip()


def unnamed(classes: Sequence[str]) -> bool:
    """Whether classes are only numbered, "0", "1", "2": nobody gave them names."""
    return all(name == str(number) for number, name in enumerate(classes))


def shown(names: Iterable[str], most: int = 5) -> str:
    """Some names for a message."""
    names = list(names)
    parts = [name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..." for name in names[:most]]
    text = ", ".join(part if part and part.isprintable() else repr(part) for part in parts)
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")


def numbers_in(classes: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """The number among ``others`` of each class, by its name; None for one that is not there.

    Raises:
        DataError: a name stands twice in one of the lists, so that it does not say which class is meant.
    """
    for names in (classes, others):
        twice = [name for name, times in Counter(map(class_name, names)).items() if times > 1]
        if twice:
            raise DataError(f"several classes have one name, which cannot be told apart: {shown(twice)}")
    number = {class_name(name): i for i, name in enumerate(others)}
    return [number.get(class_name(name)) for name in classes]


def union(lists: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """The classes of several lists: those of the first, and after them what each further one has that none before has.

    Args:
        lists: where each is from, for messages, and its names; empty ones say nothing.

    Raises:
        DataError: some are names, others only numbers; or a name stands twice in a list.
    """
    together: dict[str, str] = {}
    first = None
    for where, classes in lists:
        if not classes:
            continue
        first = first or (where, classes)
        if unnamed(classes) != unnamed(first[1]):
            numbered, named = (where, first[0]) if unnamed(classes) else (first[0], where)
            raise DataError(
                f"the classes of {numbered} are only numbered, those of {named} have names: name them with "
                f"`sluice prep index {numbered} --classes FILE`"
            )
        numbers_in(classes, ())
        for name in classes:
            together.setdefault(class_name(name), name)
    return tuple(together.values())
