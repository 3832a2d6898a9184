"""An encoder with a classifier on it, as all objectives have it that adapt or extend what labels have taught.

Names of parameters are those of supervised training ("encoder.", "norm.", "head."), so that a run of it is where they
start from. Shape letters: B samples, D width of what the classifier reads, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext
from pipeline.nn.batch_norm import GlobalBatchNorm, frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageClassifier
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels
from pipeline.nn.start import start_as_big_vision

SHOWN = 8
"""Samples in the showcase."""


class WeightNormLinear(nn.Linear):
    """A linear layer whose rows have a direction and a length of their own.

    Salimans and Kingma, "Weight Normalization" (NeurIPS 2016). It begins as the linear layer that it is drawn as.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.length = nn.Parameter(torch.ones(outputs))
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Lengths as the rows have them, after these were drawn."""
        self.length.copy_(self.weight.norm(dim=1))

    def forward(self, input: Tensor) -> Tensor:
        """[B,D] to [B,K]."""
        rows = functional.normalize(self.weight.float(), dim=1) * self.length.float()[:, None]
        return functional.linear(input, rows.to(input.dtype), self.bias)


class ClassifierConfig(EncoderConfig):
    """Settings of a classifier on an encoder; those of a run that it starts from must be the same."""

    small_stem: bool = False
    """The stem for images of 32 pixels, of a ResNet."""
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    """Width of a linear layer with batch norm between encoder and classifier, as source-free adaptation has it (Liang
    et al. 2020, appendix); left out: none."""
    weight_norm: bool = False
    """Of the classifier: rows of its weights have lengths of their own (ibid.)."""
    head_std: Annotated[float, Field(gt=0)] = 0.01
    """Of the classifier's initial weights, a truncated normal distribution."""


def bottleneck(inputs: int, width: int) -> nn.Sequential:
    """Linear and batch norm over all ranks; drawn as SHOT's code draws them (Xavier's normal distribution)."""
    linear = nn.Linear(inputs, width)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, GlobalBatchNorm(nn.BatchNorm1d(width)))


def classifying_head(width: int, classes: int, std: float, weight_norm: bool) -> nn.Linear:
    """A linear classifier."""
    head = WeightNormLinear(width, classes) if weight_norm else nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    if isinstance(head, WeightNormLinear):
        head.settle()
    return head


class Classifier(Objective):
    """Encoder, what may stand behind it, and a linear classifier; subclasses bring the loss.

    Args:
        config: of the encoder and what stands behind it.
        facts: of the data.
        name: of the objective.
    """

    norm: nn.Module

    def __init__(self, config: ClassifierConfig, facts: DataFacts, name: str) -> None:
        super().__init__()
        if len(facts.classes) < 2:
            raise ConfigError(
                f"objective {name!r} needs a data set whose manifest names at least two classes, this one has "
                f"{len(facts.classes)}; build it from a source with labels"
            )
        self.name, self.classes = name, facts.classes
        self.encoder = construct_encoder(
            config, facts.image_size, name, start=start_as_big_vision, stem_of_small_images=config.small_stem
        )
        self.norm = bottleneck(self.encoder.dim, config.bottleneck) if config.bottleneck else nn.Identity()
        width = config.bottleneck or self.encoder.dim
        self.head = classifying_head(width, len(facts.classes), config.head_std, config.weight_norm)
        self._labels_checked = False

    def labels_of(self, batch: Batch) -> Tensor:
        """int64[B]; looked at once, since that waits for the device.

        Raises:
            DataError: a label is of no class.
        """
        if not self._labels_checked:
            check_labels(batch["label"], self.classes)
            self._labels_checked = True
        return batch["label"]

    def seen(self, image: Tensor, batch: Batch, ctx: StepContext, purpose: str = "dropout") -> tuple[Tensor, Tensor]:
        """uint8[B,C,H,W] of the samples of ``batch`` to what the classifier reads [B,D], and logits float32[B,K]."""
        with dropping_for(batch, ctx, purpose):
            features = self.norm(self.encoder(image))
            return features, self.head(features).float()

    def encoders(self) -> dict[str, nn.Module]:
        """The backbone with its own pooling; "logits" is the classifier on it."""
        return {"image": self.encoder, "logits": ImageClassifier(self.encoder, self.norm, self.head)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone: positions and class token."""
        return self.encoder.no_weight_decay("encoder.")

    def layers(self) -> Sequence[Sequence[str]]:
        """Stem and blocks, as timm groups them; what stands behind them comes after the last."""
        return self.encoder.layers("encoder.")

    def shown(self, batch: Batch, ctx: StepContext) -> Picture:
        """A row of images, and what they are taken for; nothing is trained or counted by it."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        with frozen_statistics(self), torch.no_grad():
            p = self.seen(batch["image"], batch, ctx)[1].softmax(dim=1)
        sure, best = p.max(dim=1)
        pairs = zip(cast("list[int]", best.tolist()), sure.tolist(), strict=True)
        said = ", ".join(f"{self.classes[guess]} ({part:.2f})" for guess, part in pairs)
        return Picture(tile([batch["image"]]), f"From left to right, taken for: {said}")
