"""WDAN: DAN where classes come with other shares in source and target.

Yan et al., "Mind the Class Weight Bias: Weighted Maximum Mean Discrepancy for Unsupervised Domain Adaptation" (CVPR
2017, arXiv 1705.00609): in the MMD a source sample of class c counts w_t(c) / w_s(c), its share in the target over that
in the source, and the target is trained on what the model takes it for. Shares of the target are what the model says of
all of it, once per epoch; those of the source are counted. Shape letters: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.config.strict import PositiveFloat
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.adaptation.adaptation import Domains, answers_of
from pipeline.nn.adaptation.aligning import Aligning, AligningConfig
from pipeline.nn.adaptation.mmd import BANDWIDTHS, Estimator, mmd
from pipeline.nn.adaptation.surveyed import SharesConfig, SurveyedAdaptation


class Config(AligningConfig):
    """Settings of WDAN; ``weight`` is that of the discrepancy."""

    bandwidths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = BANDWIDTHS
    """Of the kernels, as parts of the mean squared distance in the batch."""
    estimator: Estimator = "unbiased"
    """"unbiased" or "biased"; "linear" knows no weights."""
    pseudo_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the cross-entropy on the target with the model's own answers (the paper's gamma)."""
    shares: SharesConfig = SharesConfig()
    """Before they are estimated, the target has no labels either."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.estimator == "linear":
            raise ValueError('the weighted discrepancy needs all pairs; set estimator = "unbiased", or "biased"')
        return self


class AdaptWDAN(Aligning, SurveyedAdaptation):
    """Cross-entropy on both domains, and weighted discrepancy."""

    measure: ClassVar[str] = "mmd"

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_wdan")
        self.config = config
        self.estimate_shares(config.shares, decided=True)
        self._counts: Tensor | None = None

    def compared(self, domains: Domains, ctx: StepContext) -> dict[str, Tensor]:
        """As DAN has it, and "pseudo", float32[B]: cross-entropy of the target with its own answers."""
        logits = answers_of(domains.target)
        pseudo = functional.cross_entropy(logits, logits.detach().argmax(dim=1), reduction="none")
        return super().compared(domains, ctx) | {"pseudo": pseudo}

    def groups(self, rows: Mapping[str, Tensor], ctx: StepContext) -> list[Tensor | None]:
        """Each sample with the weight of its class."""
        self._counts = self.shares.with_batch(rows["label"])
        if ctx.clock.progress < self.config.shares.since:
            return super().groups(rows, ctx)
        weight = self.shares.ratios(self._counts)[rows["label"]]
        return [weight if group is None else weight * group for group in super().groups(rows, ctx)]

    def distance(self, source: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        """The squared MMD."""
        config = self.config
        return mmd(source, target, weights=weights, bandwidths=config.bandwidths, estimator=config.estimator)

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """As DAN has it, and the target's cross-entropy."""
        losses, metrics = super().beside(rows, ctx)
        weight = self.config.pseudo_weight if ctx.clock.progress >= self.config.shares.since else 0.0
        return losses + weight * rows["pseudo"], metrics | {"pseudo": rows["pseudo"].detach().mean()}

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Count the source's classes."""
        assert self._counts is not None, "no loss was computed since the last update"
        self.shares.counts.copy_(self._counts)
        self._counts = None
