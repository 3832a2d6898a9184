"""What methods share that learn from a few labels and many images without: two data sets in one forward, and ramps.

``data.train`` is the labelled part; ``[data.beside.unlabelled]`` all the rest, or all, whose labels are not read.
Shape letters: B labelled samples, r unlabelled ones for each, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, DataFacts, Picture, StepContext
from pipeline.core.random import SampleRandom
from pipeline.nn.classifier import Classifier, ClassifierConfig

UNLABELLED = "unlabelled"
"""Name of the data set beside the first."""


def linear_ramp(progress: float, begin: float, end: float) -> float:
    """0 up to ``begin``, 1 from ``end`` on, and a line between (Lee 2013, equation 16)."""
    if progress < begin:
        return 0.0
    return 1.0 if progress >= end else (progress - begin) / (end - begin)


def sigmoid_ramp(progress: float, end: float) -> float:
    """exp(-5 (1 - t)^2) up to ``end``, then 1 (Laine and Aila, "Temporal Ensembling", ICLR 2017)."""
    t = min(1.0, progress / end) if end else 1.0
    return math.exp(-5 * (1 - t) ** 2)


def cut_out(x: Tensor, random: SampleRandom, largest: float, fill: Tensor) -> Tensor:
    """Fill a rectangle of each image, of the image's shape and at most ``largest`` of its sides.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (arXiv 1708.04552), with
    a random size and cut at the edges, as FixMatch's authors and USB have it.

    Args:
        x: [B,C,H,W].
        random: numbers of the samples.
        largest: side of the rectangle, as a part of the image's.
        fill: [C], what is filled in.
    """
    size, *centre = random.uniform(3).to(x.device).unbind(1)
    inside = []
    for sides, at in zip(x.shape[2:], centre, strict=True):
        length = size * largest * sides
        low = (at * sides - length / 2).clamp_min(0)
        place = torch.arange(sides, device=x.device) + 0.5
        inside.append((place >= low[:, None]) & (place < (low + length)[:, None]))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(hole, fill.to(x).view(1, -1, 1, 1), x)


class FewLabels(Classifier):
    """A classifier on labelled and unlabelled images.

    Args:
        config: of the classifier.
        facts: of the data; classes are those of the labelled part.
        name: of the objective.
        views: of each unlabelled image.
    """

    def __init__(self, config: ClassifierConfig, facts: DataFacts, name: str, views: int) -> None:
        super().__init__(config, facts, name)
        image = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": image, "label": "int64[B]", f"{UNLABELLED}_image": image}
        self.needs |= {f"{UNLABELLED}_image{n}": image for n in range(2, views + 1)}

    def both(self, batch: Batch) -> tuple[Batch, Batch]:
        """The labelled samples and the unlabelled ones.

        Raises:
            ConfigError: there are no unlabelled ones.
            DataError: a label is of no class.
        """
        known = batch_of(batch)
        self.labels_of(known)
        return known, batch_of(batch, UNLABELLED)

    def together(self, groups: Sequence[tuple[Batch, Tensor]], ctx: StepContext) -> tuple[list[Tensor], Tensor]:
        """Images uint8[n,C,H,W] of several groups of samples through one forward, so that batch norm is common.

        Returns:
            Logits of each group; what the classifier reads of the first one, without gradient.
        """
        samples = {name: torch.cat([batch[name] for batch, _ in groups]) for name in ("id", "epoch")}
        features, logits = self.seen(torch.cat([image for _, image in groups]), samples, ctx)
        return list(logits.split([len(image) for _, image in groups])), features[: len(groups[0][1])].detach()

    def supervised(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each labelled sample [B], and the part that is answered rightly."""
        right = (logits.detach().argmax(dim=1) == label).float().mean()
        return functional.cross_entropy(logits, label, reduction="none"), right

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of unlabelled images, and what they are taken for."""
        return {"answers": self.shown(batch_of(batch, UNLABELLED), ctx)}


def spread(losses: Tensor, samples: int) -> Tensor:
    """Losses of r B unlabelled samples as those of the B labelled ones that they came with, [r B] to [B]."""
    return losses.view(samples, -1).mean(dim=1)


def confident(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The class that each answer is for, int64[n], and whether it is at least as sure as ``threshold``, float[n]."""
    sure, best = logits.detach().softmax(dim=1).max(dim=1)
    return best, (sure >= threshold).to(sure)
