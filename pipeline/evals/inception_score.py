"""Inception score: made images should each look like one class to a classifier, and all classes should come up.

Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016), with this project's classifiers in place of
Inception: exp of the mean KL divergence of p(class | image) from p(class).
Shape letters: N samples, K classes.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number, Uses
from pipeline.evals._samples import OfSamples, SamplesConfig, finite

SEED = 2020
"""Of the order in which samples are split: torch-fidelity's."""


class Config(SamplesConfig):
    """Settings of the inception score."""

    space: Literal["judge.logits", "logits"] = "judge.logits"
    """The classifier: of the run that judges, or of the model itself."""
    splits: Annotated[int, Field(ge=1)] = 1
    """Parts that a score is taken of, for their mean; papers have 10, which lowers it where there are few samples."""
    reference: Annotated[str, Field(min_length=1)] | None = None
    """Stream of real images whose score is reported too; left out: none."""


class InceptionScore(OfSamples):
    """Reports "inception_score/score", from 1 to the judge's number of classes, and that number as "_classes".

    "inception_score/score_real" is that of the real images. With one split the standard error is that of the mean
    divergence, times the score (p(class) counts in second order only); with more it is that of the splits.
    """

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.judges = (config.space,)

    def uses(self) -> Uses:
        """The real images too, if any."""
        streams, encoders, _ = super().uses()
        name = self.config.reference
        return Uses({**streams, name: ("image", *streams.get(name, ()))} if name else streams, encoders)

    def check(self, ctx: EvalContext) -> None:
        """No split without a sample."""
        super().check(ctx)
        own = self.config
        counts = {"samples": own.samples}
        if own.reference is not None:
            counts[f"images in stream {own.reference!r}"] = ctx.streams[own.reference].samples
        for what, count in counts.items():
            if count < own.splits:
                raise ConfigError(f"inception_score.splits = {own.splits}: there are only {count} {what}")

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make and classify; every rank its share.

        Raises:
            DataError: logits are not finite.
            NonFiniteError: a sample is not finite.
        """
        own = self.config
        made = self.judged(ctx, own.space).x
        parts = [("", made, "made")]
        if own.reference is not None:
            real = ctx.features(own.space, own.reference, fields=()).x
            parts.append(("_real", finite(real, own.space, f"stream {own.reference!r}"), own.reference))
        for what, logits, split in parts:
            better: Any = None if what else "higher"
            yield Number(f"inception_score/score{what}", *_score(logits, own.splits, split), better)
        yield Number("inception_score/classes", made.shape[1], len(made), "made", better=None)


def _score(logits: Tensor, splits: int, split: str) -> tuple[float, int, str, float]:
    found = [divergences(part) for part in _split(logits, splits)]
    scores = [math.exp(float(part.mean())) for part in found]
    if splits == 1:
        error = scores[0] * float(found[0].std(correction=0)) / math.sqrt(len(logits))
    else:
        error = float(np.std(scores)) / math.sqrt(splits)
    return float(np.mean(scores)), len(logits), split, error


def _split(logits: Tensor, splits: int) -> list[Tensor]:
    """Parts of shuffled rows, as torch-fidelity cuts them."""
    if splits == 1:
        return [logits]
    n, rows = len(logits), logits[torch.from_numpy(np.random.RandomState(SEED).permutation(len(logits)))]
    return [rows[i * n // splits : (i + 1) * n // splits] for i in range(splits)]


def divergences(logits: Tensor) -> Tensor:
    """KL divergence of each row's p from the mean p, in nats: float[N,K] to float64[N]."""
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    return torch.special.xlogy(p, p).sum(dim=1) - torch.special.xlogy(p, p.mean(dim=0)).sum(dim=1)
