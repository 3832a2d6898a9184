"""Numbers of a sample's .json member: ``metadata``, float64[B,C], a column for each name in the configuration."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field as Limits

from pipeline.config.schema import Strict
from pipeline.config.schema import Text as Word
from pipeline.core.errors import ConfigError
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable
from pipeline.data.jsons import read_table, value_at


class Config(Strict):
    """Which numbers."""

    columns: Annotated[tuple[Word, ...], Limits(min_length=1)]
    """Keys of the table, in the order of the C columns; "size.width" for one inside another."""
    member: Word = "metadata"
    missing: float | None = None
    """What stands for a number that a sample lacks; left out: such a sample is bad, and replaced."""


class Metadata(Field):
    """Numbers; true and false are 1 and 0, what is not finite is missing.

    Raises:
        ConfigError: the data set has no such member; a column is named twice.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        if len(set(config.columns)) < len(config.columns):
            raise ConfigError(f"{source.where}.columns: a column is named twice")
        self._config = config
        self.needs = (source.has(config.member, f"{source.where}.member"),)
        self.columns = {source.name: Column("float64", (len(config.columns),))}
        self._name = source.name

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        try:
            table = read_table(sample.members[self._config.member])
            arrays[self._name][row] = [self._number(table, key) for key in self._config.columns]
        except ValueError as error:
            raise Unusable(self._config.member, str(error)) from error

    def _number(self, table: dict[str, Any], key: str) -> float:
        value = value_at(table, key, None)
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{key!r} is {str(value)[:40]!r}, not a number")
        try:
            number = math.nan if value is None else float(value)
        except OverflowError:
            raise ValueError(f"{key!r} is too large for a number") from None
        if math.isfinite(number):
            return number
        if self._config.missing is None:
            raise ValueError(f"it has no number {key!r}; set missing, or leave such samples out")
        return self._config.missing
