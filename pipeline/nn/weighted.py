"""A part of a loss whose weight may change along the run."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from pipeline.config.strict import Strict

Weight = Annotated[float, Field(ge=0)]


class Weighted(Strict):
    """Settings of such a part."""

    weight: Weight | tuple[tuple[Weight, Weight], ...] = 1.0
    """Or a schedule: points [part of the run, weight], straight lines between them."""

    @field_validator("weight")
    @classmethod
    def _in_order(cls, weight: float | tuple[tuple[float, float], ...]) -> float | tuple[tuple[float, float], ...]:
        if isinstance(weight, tuple):
            parts = [part for part, _ in weight]
            if not parts or parts != sorted(set(parts)) or parts[-1] > 1:
                raise ValueError("a schedule is [part of the run, weight], ...; parts rise from 0 to 1")
        return weight

    def weight_at(self, progress: float) -> float:
        """The weight at a part of the run, 0 to 1."""
        if isinstance(self.weight, tuple):
            parts, weights = zip(*self.weight, strict=True)
            return float(np.interp(progress, parts, weights))
        return self.weight
