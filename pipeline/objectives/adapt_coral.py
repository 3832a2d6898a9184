"""Deep CORAL: source and target have the same covariances.

Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation" (ECCV 2016 workshops, arXiv 1607.01719):
cross-entropy on the source plus |C_s - C_t|_F^2 / (4 d^2) of the last layer. With many classes or wide features the
quarter over d^2 makes it small: compare "coral_logits" with "classification" in the metrics; the paper chooses the
weight so that both are about equal at the end.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.config.strict import Text
from pipeline.core.protocols import DataFacts
from pipeline.nn.adaptation.aligning import Aligning, AligningConfig
from pipeline.nn.adaptation.classifier import LOGITS
from pipeline.nn.adaptation.moments import coral, moments


class Config(AligningConfig):
    """Settings of Deep CORAL; ``weight`` is that of the distance of the covariances."""

    layers: Annotated[tuple[Text, ...], Field(min_length=1)] = (LOGITS,)
    """Which are compared: "logits", "features" (what the classifier reads), and blocks of the encoder by name, averaged
    over their places."""


class AdaptCORAL(Aligning):
    """Cross-entropy and the distance of covariances."""

    measure: ClassVar[str] = "coral"

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_coral")

    def distance(self, source: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """|C_s - C_t|_F^2 / (4 d^2)."""
        return coral(moments(source, weights), moments(target))
