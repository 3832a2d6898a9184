"""CORAL between sources: features of all domains of the source have the same mean and covariance.

Sun and Saenko, "Deep CORAL" (ECCV 2016 workshops), between every two sources of domain generalisation, as DomainBed has
it (Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, arXiv 2007.01434), where it is the
best of fourteen methods: cross-entropy plus the mean over pairs of domains of the mean squared differences of means and
of covariances. Plain training on several sources (ERM) is `supervised`. Shape letters: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, DataFacts, StepContext
from pipeline.nn.adaptation.classifier import ClassifierConfig, Classifying
from pipeline.nn.adaptation.moments import moment_distance, moments
from pipeline.nn.adaptation.sources import check_sources, domain_of
from pipeline.nn.weighted import Weighted


class Config(ClassifierConfig, Weighted):
    """Settings of CORAL between sources; ``weight`` is that of the distance."""


class CoralSources(Classifying):
    """Cross-entropy, and how far domains are apart."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "coral_sources")
        check_sources(facts, "coral_sources")
        self.config = config

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Cross-entropy, features float[B,D] and domain of each sample."""
        batch = batch_of(batch)
        features, logits = self.seen(batch["image"], batch, ctx)
        rows = self.classified(features, logits, self.labels_of(batch))
        return rows | {"features": features, "domain": domain_of(batch["id"], self.facts)}

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance is of all samples together; each has an equal part of it."""
        of_domain = [
            moments(rows["features"], (rows["domain"] == number).float()) for number in range(len(self.facts.domains))
        ]
        distance = torch.stack([moment_distance(one, other) for one, other in combinations(of_domain, 2)]).mean()
        losses = rows["classification"] + self.config.weight_at(ctx.clock.progress) * distance
        return losses, {"coral": distance.detach()}
