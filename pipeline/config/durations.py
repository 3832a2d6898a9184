"""Durations with a unit: "90ep" epochs, "500ba" batches (updates), "12.8Gsa" samples, "5%" of the run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, cast

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

Unit = Literal["ep", "ba", "sa", "%"]
FORM = "'90ep', '500ba', '12.8Gsa' or '5%'"
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kMG]?)(ep|ba|sa)|(%))", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """A length of training, in the unit in which it was written; resolved once, by :meth:`steps`."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read "90ep", "500ba", "12.8Gsa" or "5%".

        Raises:
            ValueError: anything else.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"cannot read duration {text!r}; write it like {FORM}")
        number, factor, unit, percent = match.groups()
        # Decimal, so that "1.1G" is exactly 1_100_000_000.
        value = float(Decimal(number) * _FACTORS[factor or ""])
        return cls(value, "%" if percent else cast("Unit", unit))

    def __str__(self) -> str:
        """The text that gives this duration back, digit for digit."""
        value, factor = Decimal(repr(self.value)), ""
        if self.unit == "sa":
            factor = next((f for f in ("G", "M", "k") if value >= _FACTORS[f]), "")
        digits = format(value / _FACTORS[factor], "f")
        if "." in digits:
            digits = digits.rstrip("0").rstrip(".")
        return f"{digits}{factor}{self.unit}"

    def steps(self, *, global_batch: int, steps_per_epoch: float, total_steps: int | None = None) -> int:
        """Updates, rounded to the nearest, at least one unless the value is zero.

        Args:
            global_batch: samples per update.
            steps_per_epoch: updates per pass over the data.
            total_steps: length of the run; needed for "%".
        """
        if self.unit == "%":
            assert total_steps is not None, "a percentage needs the run's length"
            exact = self.value / 100 * total_steps
        elif self.unit == "ep":
            exact = self.value * steps_per_epoch
        elif self.unit == "ba":
            exact = self.value
        else:
            exact = self.value / global_batch
        return max(1, round(exact)) if exact > 0 else 0

    def period(self, *, global_batch: int, steps_per_epoch: Fraction, total_steps: int) -> Fraction:
        """Updates from one time to the next of what recurs: not rounded, so that nothing drifts. See :meth:`steps`."""
        value = Fraction(repr(self.value))
        if self.unit == "%":
            return value / 100 * total_steps
        if self.unit == "ep":
            return value * steps_per_epoch
        return value if self.unit == "ba" else value / global_batch

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Config fields of this type are written as text and shown as text."""

        def read(value: object) -> Duration:
            if isinstance(value, cls):
                return value
            if isinstance(value, str):
                return cls.parse(value)
            raise ValueError(f"a duration needs a unit: write it like {FORM}, not {value!r}")

        return core_schema.no_info_plain_validator_function(read, serialization=core_schema.to_string_ser_schema())
