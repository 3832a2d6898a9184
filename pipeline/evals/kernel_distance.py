"""Kernel distance (KID) between made and real images, in the feature space of an encoder that judges them.

Binkowski et al., "Demystifying MMD GANs" (ICLR 2018, arXiv 1801.01401): the unbiased estimate of the squared maximum
mean discrepancy with the kernel (x.y / D + 1)^3, as a mean over random subsets, which are those that torch-fidelity
draws. Unlike the Frechet distance it does not grow when there are fewer samples: of the same distribution it is 0 on
average, and may be negative. The standard error is the delete-d jackknife of Shao and Wu, "A General Theory for
Jackknife Variance Estimation" (Annals of Statistics 1989), which knows that subsets overlap.
Shape letters: N made images, M real ones, S of a subset, D width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number
from pipeline.dist.group import Place, sum_over_ranks
from pipeline.evals._judged import Judged, JudgedConfig

SEED = 2020
"""Of the subsets: torch-fidelity's. numpy promises that RandomState draws the same for ever."""


class Config(JudgedConfig):
    """Settings of the kernel distance."""

    subset: Annotated[int, Field(ge=2)] = 1000
    """Images of each kind that are compared at a time."""
    subsets: Annotated[int, Field(ge=1)] = 100


class KernelDistance(Judged):
    """Reports "kernel_distance/kid" and its "_std", the standard deviation over subsets that papers quote; and
    "kernel_distance/kid_real", of as many real images, or half of all, and the other real images.
    """

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self, ctx: EvalContext) -> None:
        """A subset is of different images."""
        super().check(ctx)
        own, samples = self.config, ctx.streams[self.config.reference].samples
        for count, what in ((own.samples, "samples"), (samples, f"images in stream {own.reference!r}")):
            if count < own.subset:
                raise ConfigError(f"kernel_distance.subset = {own.subset}: there are only {count} {what}; set it lower")

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make and encode on all ranks; each compares its part of the subsets.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: a sample is not finite.
        """
        own, split = self.config, self.config.reference
        for what, made, real in self.pairs(*self.both(ctx)):
            size = min(own.subset, len(made))
            values = kernel_distances(made, real, size, own.subsets, ctx.place)
            better: Any = None if what else "lower"
            error = standard_error(values, size, min(len(made), len(real)))
            yield Number(f"kernel_distance/kid{what}", float(values.mean()), len(made), split, error, better)
            if not what:
                std = float(values.std(correction=0))
                yield Number("kernel_distance/kid_std", std, len(made), split, better=None)


def kernel_distances(made: Tensor, real: Tensor, size: int, subsets: int, place: Place) -> Tensor:
    """Of each subset, float64[subsets], of features [N,D] and [M,D]; every rank works out its part.

    Args:
        made: the same on every rank.
        real: likewise.
        size: of a subset, at most N and M.
        subsets: how many.
        place: of this rank.
    """
    draw, values = np.random.RandomState(SEED), torch.zeros(subsets, dtype=torch.float64)
    for number in range(subsets):
        rows = [torch.from_numpy(draw.choice(len(x), size, replace=False)) for x in (made, real)]
        if number % place.world_size == place.rank:
            x, y = (x[r].to(place.device).double() for x, r in zip((made, real), rows, strict=True))
            values[number] = squared_discrepancy(x, y)
    return sum_over_ranks(values)


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of the squared discrepancy (Gretton et al. 2012, eq. 3) of float64[S,D] each, S > 1."""
    size = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return within / (size * (size - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def standard_error(values: Tensor, size: int, count: int) -> float | None:
    """Of the mean of ``values``, subsets of ``size`` from ``count``; None where every subset is all there is."""
    if size == count or len(values) == 1:
        return None
    variance = float(values.var(correction=0))
    return math.sqrt(variance * (size / (count - size) + 1 / len(values)))
