"""AaD: adapt a classifier to unlabelled images of another domain by attracting neighbours and dispersing the rest.

Yang et al., "Attracting and Dispersing: A Simple Approach for Source-free Domain Adaptation" (NeurIPS 2022),
https://arxiv.org/abs/2205.04183, equation 5: a sample is to answer as its nearest neighbours in feature space do, which
are looked up in a bank of all samples, and otherwise than the other samples of the batch. ``data.train`` is the target,
whose labels are not read; ``start.from`` is a run of ``supervised`` on the source, with the same encoder and classes.
Shape letters: B samples, N samples of the data set, D width, K classes, k neighbours.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    Clock,
    DataFacts,
    Embeddings,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
    Survey,
)
from pipeline.dist.collectives import all_gather, global_mean, rank_and_world
from pipeline.dist.gather import gather_ragged
from pipeline.nn.classifier import Classifier, ClassifierConfig


class Config(ClassifierConfig):
    """Settings of AaD; the defaults are those for VisDA."""

    neighbours: Annotated[int, Field(ge=1)] = 5
    """k."""
    dispersion: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the second part at the beginning."""
    decay: Annotated[float, Field(ge=0)] = 5.0
    """It falls as (1 + 10 progress)^-decay."""
    refresh: Duration = Duration(100.0, "%")
    """From one filling of the whole bank to the next; the first is before the first update. Left out, it is the only
    one, and entries change when their samples are seen."""

    @model_validator(mode="after")
    def _the_bank_is_filled(self) -> "Config":
        if self.refresh.value == 0:
            raise ValueError("refresh: without a first look at all samples the bank holds no neighbours; leave it out")
        return self


class AdaptNeighbours(Classifier, PairwiseObjective):
    """Encoder and classifier, both trained, and a bank of unit features [N,D] and answers [N,K] of all samples."""

    bank: Tensor
    answers: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_neighbours")
        if facts.samples and facts.samples <= config.neighbours:
            raise ConfigError(
                f"objective.neighbours = {config.neighbours}: the data set has {facts.samples} samples, so none has so "
                "many others; take fewer"
            )
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.register_buffer("bank", torch.zeros(facts.samples, self.head.in_features))
        self.register_buffer("answers", torch.zeros(facts.samples, len(facts.classes)))
        self._fresh: dict[str, Tensor] | None = None

    def surveys(self) -> Mapping[str, Survey]:
        """The bank."""
        return {"bank": Survey(self.config.refresh)}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Entries of the samples."""
        features, logits = self.seen(batch["image"], batch, ctx)
        return {"feature": functional.normalize(features.float(), dim=1), "answer": logits.softmax(dim=1)}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Fill the bank."""
        ids = gather_ragged(rows["id"])
        for buffer, name in ((self.bank, "feature"), (self.answers, "answer")):
            buffer[ids] = gather_ragged(rows[name]).to(buffer.dtype)

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Unit features without gradient, and answers."""
        features, logits = self.seen(batch["image"], batch, ctx)
        unit = functional.normalize(features.detach().float(), dim=1)
        return {"id": batch["id"], "feature": unit, "answer": logits.softmax(dim=1)}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """-sum over neighbours of p.q, and p.p' summed over the other samples of the global batch.

        "agreement" is the mean p.q, "dispersion" the mean p.p', from 0 to 1 each.
        """
        rows, world = embeddings.rows, rank_and_world()[1]
        p, total = rows["answer"], len(rows["answer"]) * world
        attracted = (self.neighbours_of(rows) * p[:, None]).sum(dim=2).sum(dim=1)
        alike = p @ (global_mean(p) * total) - p.square().sum(dim=1)
        weight = self.config.dispersion * (1 + 10 * ctx.clock.progress) ** -self.config.decay
        losses = weight * alike - attracted
        metrics = {
            "agreement": attracted.detach().mean() / self.config.neighbours,
            "dispersion": alike.detach().mean() / max(1, total - 1),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), rows["feature"])

    @torch.no_grad()
    def neighbours_of(self, rows: dict[str, Tensor]) -> Tensor:
        """Answers of each sample's neighbours, [B,k,K]; those of this batch as they are now, the others from the bank.

        The bank itself is renewed once, after the update.
        """
        fresh = {name: all_gather(rows[name].detach()) for name in ("id", "feature", "answer")}
        bank, answers = self.bank.float(), self.answers.float()
        similar = rows["feature"] @ bank.T
        similar[:, fresh["id"]] = rows["feature"] @ fresh["feature"].T
        similar[torch.arange(len(similar), device=similar.device), rows["id"]] = -torch.inf
        nearest = similar.topk(self.config.neighbours, dim=1).indices
        self._fresh = fresh
        return answers.index_copy(0, fresh["id"], fresh["answer"].float())[nearest]

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Put the samples of the step into the bank."""
        assert self._fresh is not None, "no loss was computed since the last update"
        self.bank[self._fresh["id"]] = self._fresh["feature"].to(self.bank.dtype)
        self.answers[self._fresh["id"]] = self._fresh["answer"].to(self.answers.dtype)
        self._fresh = None

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of images of the target, and what they are taken for."""
        return {"answers": self.shown(batch, ctx)}
