"""SHOT: adapt a classifier to unlabelled images of another domain, without the images that it was trained on.

Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
Adaptation" (ICML 2020), https://arxiv.org/abs/2002.08546. The classifier stays; the encoder learns to answer surely and
evenly (information maximisation), and as centroids of the classes say that are found anew in each epoch. ``data.train``
is the target, whose labels are not read; ``start.from`` is a run of ``supervised`` on the source, with the same encoder
and classes. Shape letters: B samples, K classes.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
    Survey,
)
from pipeline.dist.collectives import global_mean
from pipeline.dist.gather import gather_ragged
from pipeline.nn.adaptation.centroids import centroid_labels
from pipeline.nn.adaptation.information import diversity, entropy
from pipeline.nn.classifier import Classifier, ClassifierConfig

NONE = -1
"""In place of a pseudo-label, of a sample that no survey has seen."""


class Config(ClassifierConfig):
    """Settings of SHOT; the defaults are its code's for objects (0.1 in place of 0.3 for digits in the paper)."""

    pseudo_labels: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the cross-entropy with pseudo-labels; 0: information maximisation alone, "SHOT-IM"."""
    every: Duration = Duration(1.0, "ep")
    """From one labelling to the next; the first is before the first update."""
    least_samples: Annotated[int, Field(ge=0)] = 0
    """Classes that are answered for no more samples than this get no centroid; the paper's 10 for a target that has
    some of the source's classes only."""
    diversity: bool = True
    """Answers are to be spread over the classes; false for such a target."""


class AdaptShot(Classifier, PairwiseObjective):
    """An encoder that is trained under a classifier that is not; both begin as they were trained on the source."""

    pseudo: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_shot")
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.head.requires_grad_(False)
        self.register_buffer("pseudo", torch.full((facts.samples,), NONE))

    def surveys(self) -> Mapping[str, Survey]:
        """The centroids, where they are wanted."""
        return {"centroids": Survey(self.config.every)} if self.config.pseudo_labels else {}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What the classifier reads of each sample, and what it answers."""
        features, logits = self.seen(batch["image"], batch, ctx)
        return {"features": features.float(), "logits": logits}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Label all samples.

        Raises:
            DataError: no class is answered often enough.
        """
        label = centroid_labels(rows["features"], rows["logits"], self.config.least_samples)
        self.pseudo.fill_(NONE)
        self.pseudo[gather_ragged(rows["id"])] = gather_ragged(label)

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Features without gradient, answers and pseudo-labels."""
        features, logits = self.seen(batch["image"], batch, ctx)
        return {"logits": logits, "pseudo": self.pseudo[batch["id"]], "features": features.detach()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Entropy of each answer, less that of the mean answer, and the cross-entropy with pseudo-labels.

        Metrics are in nats; "pseudo_agreement" is how often answer and pseudo-label are the same.
        """
        logits, pseudo = embeddings.rows["logits"], embeddings.rows["pseudo"]
        sure = entropy(logits)
        spread = diversity(global_mean(logits.softmax(dim=1)))
        losses = sure - spread if self.config.diversity else sure
        metrics = {"entropy": sure.mean(), "diversity": spread}
        if self.config.pseudo_labels:
            taught = functional.cross_entropy(logits, pseudo, ignore_index=NONE, reduction="none")
            losses = losses + self.config.pseudo_labels * taught
            agreement = (logits.argmax(dim=1) == pseudo).float().mean()
            metrics |= {"cross_entropy": taught.mean(), "pseudo_agreement": agreement}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return StepOutput(losses.mean(), metrics, losses.detach(), embeddings.rows["features"])

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of images of the target, and what they are taken for."""
        return {"answers": self.shown(batch, ctx)}
