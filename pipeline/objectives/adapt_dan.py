"""DAN: features of source and target have the same distribution on several layers, as kernels of many widths see it.

Long et al., "Learning Transferable Features with Deep Adaptation Networks" (ICML 2015, arXiv 1502.02791): cross-entropy
on the source plus the multi-kernel MMD of each layer, here with the sum of the kernels and not with learned weights, as
the authors' library has it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config.strict import PositiveFloat
from pipeline.core.protocols import DataFacts
from pipeline.nn.adaptation.aligning import Aligning, AligningConfig
from pipeline.nn.adaptation.mmd import BANDWIDTHS, Estimator, mmd


class Config(AligningConfig):
    """Settings of DAN; ``weight`` is that of the discrepancy."""

    bandwidths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = BANDWIDTHS
    """Of the kernels, as parts of the mean squared distance in the batch."""
    estimator: Estimator = "unbiased"
    """See :func:`pipeline.nn.adaptation.mmd.mmd`."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.per_source and self.estimator == "linear":
            raise ValueError('per_source needs all pairs of a domain; set estimator = "unbiased", or "biased"')
        return self


class AdaptDAN(Aligning):
    """Cross-entropy and discrepancy."""

    measure: ClassVar[str] = "mmd"

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_dan")
        self.config = config

    def distance(self, source: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """The squared MMD."""
        config = self.config
        return mmd(source, target, weights=weights, bandwidths=config.bandwidths, estimator=config.estimator)
