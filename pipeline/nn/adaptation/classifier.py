"""What objectives of adaptation and generalisation have in common: cross-entropy, and what is beside it.

Shape letters: B samples, C channels, H height, W width, D width of the features, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.core.batch import batch_of
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Embeddings, PairwiseObjective, Picture, StepContext, StepOutput
from pipeline.nn import classifier
from pipeline.nn.teacher import Seen, see

FEATURES, LOGITS = "features", "logits"
"""Layers that always are: what the classifier reads, and what it answers."""


class ClassifierConfig(classifier.ClassifierConfig):
    """Settings of encoder and classifier."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the target that is spread over all classes."""


class Classifying(classifier.Classifier, PairwiseObjective):
    """Encoder, linear classifier, and cross-entropy on the first data set.

    ``embed`` gives "classification", float32[B], "metric.NAME", float32[B], of what is to be shown, and "seen",
    float[B,D], what the classifier reads; ``loss`` adds :meth:`beside`, what a method asks for beside it.
    """

    def __init__(self, config: ClassifierConfig, facts: DataFacts, name: str) -> None:
        super().__init__(config, facts, name)
        self.base, self.facts = config, facts
        self.image_spec = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": self.image_spec, "label": "int64[B]"}

    @property
    def width(self) -> int:
        """D."""
        return self.head.in_features

    def check_layers(self, layers: Sequence[str]) -> None:
        """Hold names of layers against the encoder.

        Raises:
            ConfigError: it has no such block, or cannot be looked into.
        """
        blocks = blocks_of(layers)
        if blocks and (self.base.checkpointing or self.base.compile):
            raise ConfigError("layers: blocks cannot be read under 'checkpointing' or 'compile'; set them to false")
        training = self.training
        with torch.no_grad():
            try:
                self.eval().answer(torch.zeros(1, len(self.base.mean), *self.facts.image_size), blocks)
            except ConfigError as error:
                raise ConfigError(f"layers: {error}; or take 'features', 'logits'") from error
            finally:
                self.train(training)

    def answer(self, x: Tensor, blocks: Collection[str] = ()) -> Seen:
        """What the classifier reads, logits in fp32, and blocks, of normalised images, float32[B,C,H,W]."""
        seen = see(self.encoder, None, x, blocks)
        features = self.norm(seen.features)
        return Seen(features, self.head(features).float(), seen.blocks)

    def classified(self, features: Tensor, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of each sample and whether its answer is right, float32[B], and "seen"."""
        right = (logits.detach().argmax(dim=1) == label).float()
        return {
            "classification": self.cross_entropy(logits, label),
            "metric.top1": right,
            "seen": features.detach(),
        }

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Of each sample, float32[B]."""
        return functional.cross_entropy(logits, label, label_smoothing=self.base.label_smoothing, reduction="none")

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Cross-entropy and what is beside it; both stand in the metrics, before weights."""
        rows = embeddings.rows
        losses, metrics = self.beside(rows, ctx)
        metrics = {"classification": rows["classification"].detach().mean()} | metrics
        metrics |= {name.removeprefix("metric."): x.mean() for name, x in rows.items() if name.startswith("metric.")}
        return StepOutput(losses.mean(), metrics, losses.detach(), rows["seen"])

    @abstractmethod
    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each sample, float32[B], cross-entropy included, and metrics; from what ``embed`` gave."""

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of images of each data set, and what they are taken for."""
        names = ["", *(field.removesuffix("_id") for field in batch if field.endswith("_id"))]
        return {name or "source": self.shown(batch_of(batch, name), ctx) for name in names}


def blocks_of(layers: Sequence[str]) -> list[str]:
    """The layers that are blocks of the encoder."""
    return sorted(set(layers) - {FEATURES, LOGITS})


def pooled(seen: Seen, layer: str) -> Tensor:
    """float[B,D] of a layer by name; maps of blocks are averaged over their places."""
    if layer == LOGITS:
        assert seen.logits is not None
        return seen.logits
    return seen.features if layer == FEATURES else seen.blocks[layer].mean(dim=(2, 3))
