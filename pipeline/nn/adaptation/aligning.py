"""What objectives have in common that hold the distributions of a layer's rows in both domains against each other.

Shape letters: B samples, D width of a layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.strict import Text
from pipeline.core.protocols import DataFacts, StepContext
from pipeline.nn.adaptation.adaptation import Adaptation, AdaptationConfig, Domains
from pipeline.nn.adaptation.classifier import FEATURES, LOGITS, pooled
from pipeline.nn.weighted import Weighted


class AligningConfig(AdaptationConfig, Weighted):
    """Settings of alignment; ``weight`` is that of the distance, the sum over layers."""

    layers: Annotated[tuple[Text, ...], Field(min_length=1)] = (FEATURES, LOGITS)
    """Which are compared: "features" (what the classifier reads), "logits", and blocks of the encoder by name, averaged
    over their places."""


class Aligning(Adaptation):
    """Cross-entropy, and a distance of the domains on some layers, which is of all samples together."""

    measure: ClassVar[str]
    """What the distance is called in the metrics."""

    def __init__(self, config: AligningConfig, facts: DataFacts, name: str) -> None:
        super().__init__(config, facts, name)
        self.aligned = config
        self.check_layers(config.layers)

    def read(self) -> Sequence[str]:
        """The layers that are compared."""
        return self.aligned.layers

    def compared(self, domains: Domains, ctx: StepContext) -> dict[str, Tensor]:
        """Both domains' rows of each layer, float[B,D], and the source's domains and labels, int64[B]."""
        rows = {f"source.{layer}": pooled(domains.source, layer) for layer in self.aligned.layers}
        rows |= {f"target.{layer}": pooled(domains.target, layer) for layer in self.aligned.layers}
        return rows | {"domain": self.domain_of(domains.source_batch), "label": domains.label}

    def groups(self, rows: Mapping[str, Tensor], ctx: StepContext) -> list[Tensor | None]:
        """Weights of the source's samples, float[B], for each comparison with the target; None: all alike."""
        if not self.settings.per_source:
            return [None]
        return [(rows["domain"] == number).float() for number in range(len(self.facts.domains))]

    @abstractmethod
    def distance(self, source: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """Of two domains' rows, float[B,D] each: float[], whose mean over ranks is the distance."""

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Each sample has an equal part of the distance."""
        groups = self.groups(rows, ctx)
        found = {
            layer: torch.stack([self.distance(rows[f"source.{layer}"], rows[f"target.{layer}"], w) for w in groups])
            for layer in self.aligned.layers
        }
        means = {layer: parts.mean() for layer, parts in found.items()}
        losses = rows["classification"] + self.aligned.weight_at(ctx.clock.progress) * sum(means.values())
        return losses, {f"{self.measure}_{layer}": value.detach() for layer, value in means.items()}
