"""Several classes of a sample at once: ``labels``, uint8[B,C], 1 for each class that it has and 0 for the others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pipeline.config.schema import Strict
from pipeline.config.schema import Text as Word
from pipeline.core.classes import class_name
from pipeline.core.errors import ConfigError
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable
from pipeline.data.jsons import read_table, value_at


class Config(Strict):
    """Where labels are found, and what they count in."""

    member: Word = "metadata"
    """A .json member with a table, or any other with a JSON list, or with numbers between commas or blanks."""
    key: Word = "labels"
    """Of a table: where the list is, "objects.classes" for one inside another."""
    classes: tuple[Word, ...] = ()
    """Names of the C classes; left out: the data set's."""


class Labels(Field):
    """Class numbers, or names of classes, as a row of zeros and ones. An empty list is a sample of no class.

    Raises:
        ConfigError: the data set has no such member, or no classes.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        self._member = source.has(config.member, f"{source.where}.member")
        self._key = config.key
        names = config.classes or source.manifest.classes
        if not names:
            raise ConfigError(f"{source.where}.classes: {source.manifest.root} has no list of classes; name them here")
        self._numbers = {class_name(name): number for number, name in enumerate(names)}
        if len(self._numbers) < len(names):
            raise ConfigError(f"{source.where}.classes: a name stands twice among the {len(names)} classes")
        self._classes = len(names)
        self.needs = (self._member,)
        self.columns = {source.name: Column("uint8", (self._classes,))}
        self._name = source.name

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        try:
            numbers = [self._number(value) for value in self._values(sample.members[self._member])]
        except ValueError as error:
            raise Unusable(self._member, str(error)) from error
        arrays[self._name][row] = 0
        arrays[self._name][row, np.array(numbers, np.int64)] = 1

    def _values(self, data: memoryview) -> list[Any]:
        text = bytes(data).strip()
        if text.startswith(b"{") or self._member == "metadata":
            values = value_at(read_table(data), self._key)
        elif text.startswith(b"["):
            values = json.loads(text)
        else:
            values = [int(word) if word.isdigit() else word.decode() for word in text.replace(b",", b" ").split()]
        if not isinstance(values, list):
            raise ValueError(f"labels {str(values)[:40]!r} are not a list")
        return values

    def _number(self, value: Any) -> int:
        number = self._numbers.get(class_name(value), -1) if isinstance(value, str) else value
        if type(number) is not int or not 0 <= number < self._classes:
            raise ValueError(f"label {str(value)[:40]!r} is not one of the {self._classes} classes")
        return number
