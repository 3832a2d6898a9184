"""Frechet distance between made and real images, in the feature space of an encoder that judges them.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017), with
this project's encoders in place of Inception, so that nothing is downloaded. The distance falls with the number of
samples n like 1 / n and depends on the encoder: compare only at the same n, reference and judge.
Shape letters: N samples, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.evaluation import EvalContext, Number
from pipeline.dist.group import from_first
from pipeline.evals._judged import Judged, JudgedConfig

ROWS = 8192
"""Features that are summed up at once."""


class Config(JudgedConfig):
    """Settings of the Frechet distance."""


class Moments(NamedTuple):
    """Of feature vectors, as a Gaussian; float64."""

    mean: Tensor
    """[D]."""
    cov: Tensor
    """[D,D], unbiased."""


def moments(x: Tensor) -> Moments:
    """Of features [N,D], N > 1, in blocks."""
    mean = x.mean(dim=0, dtype=torch.float64)
    outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        away = rows.double() - mean
        outer.addmm_(away.T, away)
    return Moments(mean, outer / (len(x) - 1))


def distance(one: Moments, other: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last by eigenvalues of a symmetric matrix, never complex."""
    (mean1, cov1), (mean2, cov2) = one, other
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * both)


class Frechet(Judged):
    """Reports "frechet/distance", "frechet/distance_real", and "frechet/width", the judge's D.

    The second is that of as many real images, or half of all, to the other real images: no model can be expected to
    come closer. With fewer samples than D the distance says little.
    """

    fewest = 4

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make and encode on all ranks; compare on the first.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: a sample is not finite.
        """
        both = self.both(ctx)
        yield from from_first(list(self._compare(ctx, *both)) if ctx.place.first else [])

    def _compare(self, ctx: EvalContext, made: Tensor, real: Tensor) -> Iterator[Number]:
        split, device = self.config.reference, ctx.place.device
        for what, one, other in self.pairs(made, real):
            found = distance(moments(one.to(device)), moments(other.to(device)))
            better = None if what else "lower"
            yield Number(f"frechet/distance{what}", found, len(one), split, better=better)
        yield Number("frechet/width", made.shape[1], len(made), split, better=None)
