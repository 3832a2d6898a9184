"""Frechet distance between made and real images, in the feature space of an encoder that judges them.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017), with
this project's encoders in place of Inception, so that nothing is downloaded. The distance falls with the number of
samples n like 1 / n and depends on the encoder: compare only at the same n, reference and judge.
Shape letters: B samples, D width.
"""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number, Uses
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._samples import OfSamples, SamplesConfig


class Config(SamplesConfig):
    """Settings of the Frechet distance."""

    reference: Annotated[str, Field(min_length=1)] = "train"
    """Stream of real images: the training data, by custom."""


class Moments(NamedTuple):
    """Of N feature vectors; float64, so that they can be added over batches and ranks."""

    count: Tensor
    total: Tensor
    """[D]."""
    outer: Tensor
    """[D,D], sum of outer products."""

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D,D] (unbiased)."""
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def moments(features: Iterator[Tensor], dim: int) -> Moments:
    """Of all ranks' features [B,D] together; the same on every rank."""
    kept = Moments(
        torch.zeros((), dtype=torch.float64),
        torch.zeros(dim, dtype=torch.float64),
        torch.zeros(dim, dim, dtype=torch.float64),
    )
    for x in features:
        x = x.double().cpu()
        for place, part in zip(kept, (torch.tensor(float(len(x))), x.sum(dim=0), x.T @ x), strict=True):
            place += part
    return Moments(*(sum_over_ranks(t) for t in kept))


def distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last by eigenvalues of a symmetric matrix, never complex."""
    (mean1, cov1), (mean2, cov2) = one.gaussian(), other.gaussian()
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * both)


class Frechet(OfSamples):
    """Reports "frechet/distance", and "frechet/width", the judge's D: with fewer samples than that it says little."""

    judges = ("judge.image",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.reference = config.reference

    def uses(self) -> Uses:
        """The real images too."""
        streams, encoders = super().uses()
        return Uses({**streams, self.reference: ("image", *streams.get(self.reference, ()))}, encoders)

    def check(self, ctx: EvalContext) -> None:
        """A covariance needs two images."""
        super().check(ctx)
        if ctx.streams[self.reference].samples < 2:
            raise ConfigError(f"frechet.reference: stream {self.reference!r} has fewer than two images")

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make, encode and compare; every rank its share.

        Raises:
            NonFiniteError: a sample is not finite.
        """
        judge, device = ctx.encoders["judge.image"], ctx.place.device
        dim = int(judge.dim)  # pyright: ignore[reportArgumentType]
        real = moments((judge(batch["image"].to(device)) for batch in ctx.streams[self.reference]), dim)
        made = moments((judge(batch.image.to(device)) for batch in self.made(ctx)), dim)
        n = self.config.samples
        yield Number("frechet/distance", distance(made, real), n, self.reference, better="lower")
        yield Number("frechet/width", dim, n, self.reference, better=None)
