"""Group DRO: the domains of the source in which the model is worse count more.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts" (ICLR 2020, arXiv 1911.08731), algorithm 1,
for domain generalisation as DomainBed has it: a group is a domain, that is a source in ``data.train``. Plain training
on several sources (ERM) is `supervised`. Shape letters: B samples, G domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.dist.collectives import all_reduce, rank_and_world
from pipeline.nn.adaptation.classifier import ClassifierConfig, Classifying
from pipeline.nn.adaptation.sources import check_sources, domain_of


class Config(ClassifierConfig):
    """Settings of group DRO."""

    rate: Annotated[float, Field(ge=0)] = 0.01
    """Of the groups' weights: each is multiplied by exp(rate * its loss) in every step (the paper's eta_q)."""


class GroupDRO(Classifying):
    """The domains' losses, weighted by how large they have been."""

    weights: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "group_dro")
        check_sources(facts, "group_dro")
        self.config = config
        self.register_buffer("weights", torch.full((len(facts.domains),), 1 / len(facts.domains)))
        self._next: Tensor | None = None

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Cross-entropy and domain of each sample."""
        batch = batch_of(batch)
        rows = self.classified(*self.seen(batch["image"], batch, ctx), self.labels_of(batch))
        return rows | {"domain": domain_of(batch["id"], self.facts)}

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_g q_g L_g, as a mean over samples; q has moved with these losses already, as the algorithm has it."""
        losses, domain = rows["classification"], rows["domain"]
        groups = len(self.weights)
        sums = losses.new_zeros(2, groups)
        sums[0].index_add_(0, domain, losses.detach())
        sums[1].index_add_(0, domain, torch.ones_like(losses))
        total, count = all_reduce(sums)
        means = total / count.clamp_min(1)
        weights = self.weights.to(means) * (self.config.rate * means).exp()
        self._next = weights / weights.sum()
        samples = len(losses) * rank_and_world()[1]
        factor = (self._next * samples / count.clamp_min(1))[domain]
        return factor * losses, {"worst_domain": means.max(), "largest_weight": self._next.max()}

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Keep the weights of the step."""
        assert self._next is not None, "no loss was computed since the last update"
        self.weights.copy_(self._next)
        self._next = None
