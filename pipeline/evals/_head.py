"""A frozen classifier: the one that was trained with its encoder, or a closed-form one fitted on clean features.

The fitted one is ridge regression on one-hot targets, on standardised features; its strength is chosen on a tenth of
the training samples that the fit does not see, in float64 from one eigendecomposition. No iterations, no seed.
Shape letters: N samples, D width, K classes.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.evaluation import EvalContext, Features, Uses
from pipeline.dist.group import from_first

HELD_OUT = 10
"""One in so many training samples chooses the strength."""
ROWS = 8192
"""Samples that are turned to float64 at once."""
EPSILON = 1e-6


class HeadConfig(Strict):
    """What classifies."""

    head: Literal["ridge", "logits"] = "ridge"
    """"ridge": a closed-form classifier on features of ``train``; "logits": what was trained with the encoder."""
    train: str = "train"
    """Stream that "ridge" is fitted on, as it is."""
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Strengths to choose from: the factor of the squared weights beside the mean squared error."""

    @property
    def encoder(self) -> str:
        """That it looks at."""
        return "logits" if self.head == "logits" else "image"

    def uses(self, *tests: str) -> Uses:
        """What it needs to classify these streams."""
        names = [*([self.train] if self.head == "ridge" else []), *tests]
        return Uses({name: ("image", "label") for name in names}, (self.encoder,))


class Classifier(NamedTuple):
    """Scores of what an encoder gives."""

    encoder: nn.Module
    weight: Tensor | None
    """float32[D,K]; None: the encoder gives the scores."""
    bias: Tensor | None
    """float32[K]."""
    classes: tuple[str, ...]
    """That are told apart."""
    whose: str
    """They are, for messages."""

    def scores(self, x: Tensor) -> Tensor:
        """[N,D] on any device to float32[N,K]; a class that was never seen scores -inf."""
        if self.weight is None or self.bias is None:
            return x.float()
        return x.float() @ self.weight.to(x.device) + self.bias.to(x.device)


def head_of(ctx: EvalContext, config: HeadConfig) -> Classifier:
    """Take the trained one, or fit it on the first rank and tell all.

    Raises:
        DataError: fewer than two classes to learn from.
    """
    encoder = ctx.encoders[config.encoder]
    if config.head == "logits":
        return Classifier(encoder, None, None, ctx.classes["logits"], "the classifier")
    train = ctx.features("image", config.train)
    counts = torch.bincount(train.label, minlength=len(train.classes))
    if int((counts > 0).sum()) < 2 or len(train.x) < 2 * HELD_OUT:
        raise DataError(
            f"stream {config.train!r} has {len(train.x)} samples of {int((counts > 0).sum())} classes; a classifier "
            f"needs two classes and {2 * HELD_OUT} samples"
        )
    weight, bias = from_first(fitted(train, config.l2) if ctx.place.first else (None, None))
    return Classifier(encoder, weight, bias, train.classes, f"stream {config.train!r}")


def fitted(train: Features, strengths: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Weight float32[D,K] and bias float32[K], for features as they are."""
    mean, std = train.x.double().mean(dim=0), train.x.double().std(dim=0, unbiased=False) + EPSILON
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    chosen = strengths[0]
    if len(strengths) > 1:
        known, best = _Solved(train.x[rest], train.label[rest], len(train.classes), mean, std), -1
        for l2 in sorted(strengths, reverse=True):  # of equals the strongest
            weight, bias = known.at(l2)
            hits = int(((train.x[held].double() @ weight + bias).argmax(dim=1) == train.label[held]).sum())
            if hits > best:
                best, chosen = hits, l2
    weight, bias = _Solved(train.x, train.label, len(train.classes), mean, std).at(chosen)
    return weight.float(), bias.float()


class _Solved:
    """Ridge regression at any strength, from one eigendecomposition of the features' second moments."""

    def __init__(self, x: Tensor, label: Tensor, classes: int, mean: Tensor, std: Tensor) -> None:
        width = x.shape[1]
        gram, cross, total = (torch.zeros(width, n, dtype=torch.float64) for n in (width, classes, 1))
        for rows, own in zip(x.split(ROWS), label.split(ROWS), strict=True):
            part = (rows.double() - mean) / std
            gram += part.T @ part
            total += part.sum(dim=0)[:, None]
            cross.index_add_(1, own, part.T)
        self.share = torch.bincount(label, minlength=classes).double() / len(x)
        self.centre, self.mean, self.std = total[:, 0] / len(x), mean, std
        centred = gram / len(x) - torch.outer(self.centre, self.centre)
        self.values, self.vectors = torch.linalg.eigh(centred)
        self.cross = self.vectors.T @ (cross / len(x) - torch.outer(self.centre, self.share))

    def at(self, l2: float) -> tuple[Tensor, Tensor]:
        """Weight float64[D,K] and bias float64[K] of the least (x w + b - y)^2 on average, plus l2 w^2."""
        weight = self.vectors @ (self.cross / (self.values.clamp_min(0) + l2)[:, None])
        bias = self.share - self.centre @ weight
        bias = bias.masked_fill(self.share == 0, -math.inf)
        weight = weight / self.std[:, None]
        return weight, bias - self.mean @ weight
