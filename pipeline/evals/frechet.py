"""Frechet distance between made and real images, in the feature space of an encoder that judges them.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017), with
this project's encoders in place of Inception, so that nothing is downloaded. The distance falls with the number of
samples n like 1 / n and depends on the encoder: compare only at the same n, reference and judge.
Shape letters: B samples, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._features import named_stream
from pipeline.evals._samples import SamplesConfig, generator_of, make


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


class Frechet(Evaluation):
    """Reports "frechet/distance", and "frechet/width", the judge's D: with fewer samples than that it says little."""

    needs = ("generator", "judge.image")

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Make, encode and compare; every rank its share.

        Raises:
            ConfigError: an unknown stream, or fewer than two real images.
            NonFiniteError: a sample is not finite.
        """
        stream = named_stream(streams, self.config.reference, "frechet.reference")
        if stream.samples < 2:
            raise ConfigError(f"frechet.reference: stream {self.config.reference!r} has fewer than two images")
        judge = encoders["judge.image"]
        dim = int(judge.dim)  # pyright: ignore[reportArgumentType]
        device = next(judge.parameters()).device
        real = moments((judge(batch["image"].to(device)) for batch in stream), dim)
        images = make(generator_of(encoders), self.config, streams)
        made = moments((judge(batch.image.to(device)) for batch in images), dim)
        n, split = self.config.samples, self.config.reference
        yield Result("frechet/distance", distance(made, real), n, split, better="lower")
        yield Result("frechet/width", dim, n, split, better=None)
