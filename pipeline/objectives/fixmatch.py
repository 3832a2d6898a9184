"""FixMatch: what a classifier is sure of in a weak view of an unlabelled image is its label in a strong one.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence" (NeurIPS 2020),
https://arxiv.org/abs/2001.07685. Weak views are crops and flips of the loader; strong ones are further crops with
RandAugment and cutout. Labelled, weak and strong images go through one forward. Evaluate its moving average: ``[ema]``.
Shape letters: B labelled samples, r unlabelled ones for each, K classes.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.core.protocols import Batch, DataFacts, StepContext, StepOutput
from pipeline.nn.classifier import ClassifierConfig
from pipeline.nn.few_labels import UNLABELLED, FewLabels, confident, cut_out, spread
from pipeline.nn.randaugment import RandAugment, rand_augment

Part = Annotated[float, Field(ge=0, le=1)]
STRONG = RandAugment(layers=3, magnitude=5.0, spread=2.5, probability=1.0)
"""About USB's, which does three operations at magnitudes drawn evenly."""


class Config(ClassifierConfig):
    """Settings of FixMatch; the defaults are the paper's."""

    threshold: Part = 0.95
    """Answers on weak views that are less sure (largest probability) teach nothing."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the unlabelled images."""
    augment: RandAugment = STRONG
    """Of strong views."""
    cutout: Part = 0.5
    """Largest side of the rectangle that strong views lose, as a part of the image's; 0: none."""

    @model_validator(mode="after")
    def _channels(self) -> "Config":
        if len(self.mean) != 3:
            raise ValueError(f"strong views are made of images of three channels, not {len(self.mean)}")
        return self


class FixMatch(FewLabels):
    """One network."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "fixmatch", views=2)
        self.config = config

    def strong(self, other: Batch, ctx: StepContext) -> Tensor:
        """Strong views of the unlabelled images, uint8[rB,3,H,W]."""
        fill = self.encoder.normalize.mean.flatten() * 255
        x = rand_augment(other["image2"], ctx.random(other, "fixmatch.augment"), self.config.augment, fill)
        return cut_out(x, ctx.random(other, "fixmatch.cutout"), self.config.cutout, fill) if self.config.cutout else x

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """ "confident" is the part of the unlabelled images that teach."""
        known, other = self.both(batch)
        groups = [(known, known["image"]), (other, other["image"]), (other, self.strong(other, ctx))]
        (labelled, weak, strong), features = self.together(groups, ctx)
        taught, top1 = self.supervised(labelled, known["label"])
        best, counts = confident(weak, self.config.threshold)
        own = functional.cross_entropy(strong, best, reduction="none") * counts
        losses = taught + self.config.weight * spread(own, len(taught))
        metrics = {
            "top1": top1,
            "loss_labelled": taught.detach().mean(),
            "loss_unlabelled": own.detach().mean(),
            "confident": counts.mean(),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), features)

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Labelled images, and the weak and the strong views of unlabelled ones."""
        known, other = self.both(batch)
        views = {"weak": other["image"], "strong": self.strong(other, ctx).to(torch.uint8)}
        return {"image": known["image"]} | {f"{UNLABELLED}_{name}": view for name, view in views.items()}
