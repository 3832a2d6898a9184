"""DANN: features from which a network cannot tell the domain, by reversing the gradient of the one that tries.

Ganin et al., "Domain-Adversarial Training of Neural Networks" (JMLR 2016, arXiv 1505.07818): the critic's cross-entropy
over the samples of both domains, and between it and the features a layer that multiplies the gradient by -lambda, which
rises along the run. With ``class_weights`` source samples of classes that the target seems to lack count less, for
the classifier and the critic: Cao et al., "Partial Adversarial Domain Adaptation" (ECCV 2018, arXiv 1808.04205). With
``per_source`` the critic tells each source's domain apart. Shape letters: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.core.protocols import DataFacts, StepContext
from pipeline.nn.adaptation.adaptation import AdaptationConfig, Domains, answers_of
from pipeline.nn.adaptation.adversary import STEEPNESS, CriticConfig, critic, reversal_at, reverse_gradient
from pipeline.nn.adaptation.surveyed import SharesConfig, SurveyedAdaptation
from pipeline.nn.dropout import dropping_for
from pipeline.nn.weighted import Weighted


class Config(AdaptationConfig, Weighted):
    """Settings of DANN; ``weight`` is that of the critic's loss."""

    critic: CriticConfig = CriticConfig()
    steepness: Annotated[float, Field(gt=0)] = STEEPNESS
    """Of the reversal: 2 / (1 + exp(-steepness * part of the run)) - 1."""
    class_weights: SharesConfig | None = None
    """For a target that has some of the source's classes alone; left out: all classes count alike."""


class AdaptDANN(SurveyedAdaptation):
    """Cross-entropy, and a critic behind a reversed gradient."""

    compares = False

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_dann")
        self.config = config
        self.answers = len(facts.domains) + 1 if config.per_source else 2
        self.critic = critic(self.width, self.answers if config.per_source else 1, config.critic)
        if config.class_weights is not None:
            self.estimate_shares(config.class_weights, decided=False)

    def compared(self, domains: Domains, ctx: StepContext) -> dict[str, Tensor]:
        """Half the critic's loss of a source and of a target sample, float32[B], and how often it is right."""
        batches = domains.source_batch, domains.target_batch
        together = {name: torch.cat([batch[name] for batch in batches]) for name in ("id", "epoch")}
        factor = reversal_at(ctx.clock.progress, self.config.steepness)
        features = torch.cat([domains.source.features, domains.target.features])
        with dropping_for(together, ctx):
            answers = self.critic(reverse_gradient(features, factor)).float()
        if self.config.per_source:
            truth = self.domain_of(domains.source_batch)
            truth = torch.cat([truth, torch.full_like(truth, self.answers - 1)])
            losses = functional.cross_entropy(answers, truth, reduction="none")
            right = answers.argmax(dim=1) == truth
        else:
            truth = torch.cat([torch.ones_like(domains.label), torch.zeros_like(domains.label)]).float()
            losses = functional.binary_cross_entropy_with_logits(answers[:, 0], truth, reduction="none")
            right = (answers[:, 0] > 0) == (truth > 0)
        of_source, of_target = losses.chunk(2)
        rows = {}
        if self.config.class_weights is not None:
            weight = self.shares.largest_is_one()[domains.label]
            of_source = weight * of_source
            rows["classification"] = weight * self.cross_entropy(answers_of(domains.source), domains.label)
        accuracy = torch.stack(right.float().chunk(2)).mean(dim=0)
        return rows | {"critic": (of_source + of_target) / 2, "metric.critic_accuracy": accuracy}

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and the critic's loss."""
        losses = rows["classification"] + self.config.weight_at(ctx.clock.progress) * rows["critic"]
        return losses, {"critic": rows["critic"].detach().mean()}
