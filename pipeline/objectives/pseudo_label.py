"""Pseudo-labels: a classifier takes what it answers on unlabelled images for their labels, more and more.

Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks" (ICML 2013
workshop): cross-entropy of labelled images plus alpha(t) times that of unlabelled ones with the class of the largest
answer, which is found anew in each update; alpha is 0 up to T1 and rises on a line to its final value at T2. Shape
letters: B labelled samples, r unlabelled ones for each.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from pipeline.config.strict import Positive
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext, StepOutput
from pipeline.nn.classifier import ClassifierConfig
from pipeline.nn.few_labels import FewLabels, confident, linear_ramp, spread

Part = Annotated[float, Field(ge=0, le=1)]


class Config(ClassifierConfig):
    """Settings of pseudo-labels; the defaults are the paper's for MNIST, whose T1 and T2 are 100 and 600 epochs."""

    alpha: Annotated[float, Field(ge=0)] = 3.0
    """Final weight of the unlabelled images."""
    ramp: tuple[Part, Part] = (0.1, 0.6)
    """T1 and T2, as parts of the run."""
    threshold: Part = 0.0
    """Answers that are less sure (largest probability) teach nothing; 0: all do, as in the paper."""
    alternate: tuple[Positive, Positive] | None = None
    """From T1 on, so many updates by unlabelled images alone, then so many by labelled ones, and so on; left out: each
    update takes both."""

    @model_validator(mode="after")
    def _ordered(self) -> "Config":
        if self.ramp[0] > self.ramp[1]:
            raise ValueError(f"ramp goes from {self.ramp[0]} down to {self.ramp[1]}; write the earlier time first")
        return self


class PseudoLabel(FewLabels):
    """One network; labelled and unlabelled images go through it together."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "pseudo_label", views=1)
        self.config = config

    def weights(self, clock: Clock) -> tuple[float, float]:
        """Of the labelled images' loss and of the unlabelled ones', in the update that follows."""
        alpha = self.config.alpha * linear_ramp(clock.progress, *self.config.ramp)
        if self.config.alternate is None or clock.progress < self.config.ramp[0]:
            return 1.0, alpha
        unlabelled, labelled = self.config.alternate
        return (0.0, alpha) if clock.step % (unlabelled + labelled) < unlabelled else (1.0, 0.0)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """ "confident" is the part of the unlabelled images that teach, "alpha" their weight."""
        known, other = self.both(batch)
        (labelled, unlabelled), features = self.together([(known, known["image"]), (other, other["image"])], ctx)
        taught, top1 = self.supervised(labelled, known["label"])
        best, counts = confident(unlabelled, self.config.threshold)
        own = functional.cross_entropy(unlabelled, best, reduction="none") * counts
        weight, alpha = self.weights(ctx.clock)
        losses = weight * taught + alpha * spread(own, len(taught))
        metrics = {
            "top1": top1,
            "loss_labelled": taught.detach().mean(),
            "loss_unlabelled": own.detach().mean(),
            "confident": counts.mean(),
            "alpha": torch.full_like(top1, alpha),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), features)
