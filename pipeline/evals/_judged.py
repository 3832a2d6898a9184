"""Made and real images as features of an encoder that judges them: what evaluations that compare the two share.

Shape letters: N made images, M real ones, D width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Uses
from pipeline.evals._samples import OfSamples, SamplesConfig, chosen, finite

Space = Literal["judge.image", "judge.logits", "image", "logits"]


class JudgedConfig(SamplesConfig):
    """Which images are made, and how they are compared with real ones."""

    space: Space = "judge.image"
    """Encoder whose features are compared: of the run that judges, or of the model itself."""
    reference: Annotated[str, Field(min_length=1)] = "train"
    """Stream of real images: the training data, by custom."""
    baseline: bool = True
    """Compare real images with real ones too, "_real": what a model would score that is as good as the data."""


class Judged(OfSamples):
    """What evaluations in the space of a judge share."""

    config: JudgedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    fewest = 2
    """Real images that are needed."""

    def __init__(self, config: JudgedConfig) -> None:
        super().__init__(config)
        self.judges = (config.space,)

    def uses(self) -> Uses:
        """The real images too."""
        streams, encoders, _ = super().uses()
        name = self.config.reference
        return Uses({**streams, name: ("image", *streams.get(name, ()))}, encoders)

    def check(self, ctx: EvalContext) -> None:
        """There must be enough to compare with."""
        super().check(ctx)
        name = self.config.reference
        if (found := ctx.streams[name].samples) < self.fewest:
            raise ConfigError(
                f"reference: stream {name!r} has {found} images, and {self.fewest} are needed; name another"
            )

    def both(self, ctx: EvalContext) -> tuple[Tensor, Tensor]:
        """Features of made images [N,D] and of the reference [M,D], in the order of their ids, the same on every rank.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: a sample is not finite.
        """
        return self.judged(ctx, self.config.space).x, self.real(ctx)

    def real(self, ctx: EvalContext) -> Tensor:
        """Features of the reference alone."""
        x = ctx.features(self.config.space, self.config.reference, fields=()).x
        return finite(x, self.config.space, f"stream {self.config.reference!r}")

    def pairs(self, made: Tensor, real: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What is compared: made with real images, ""; and with ``baseline`` real ones with others, "_real"."""
        yield "", made, real
        if self.config.baseline:
            yield "_real", *halves(real, len(made))


def halves(real: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` rows of ``real`` that stand for made images, or half of all if that is fewer, and the other rows.

    They are drawn once for all: a function of the number of rows alone.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    cut = min(count, len(real) // 2)
    return real[order[:cut]], real[order[cut:]]


def spread(rows: Tensor, count: int) -> Tensor:
    """``count`` rows, drawn once for all; all where there are no more."""
    return rows if len(rows) <= count else rows[chosen(torch.arange(len(rows)), len(rows), count)]
