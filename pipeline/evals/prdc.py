"""Precision, recall, density and coverage: are made images like real ones, and are all kinds of real ones made?

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (NeurIPS 2019): an image
lies in a set if it is no farther from some image of the set than that one's k-th nearest other image of the set. Naeem
et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (ICML 2020): density counts in how many of the
real images' balls a made one lies, in parts of the k that are expected; coverage is the part of real balls with a made
image inside. Compare only at the same numbers of images, k and judge.
Shape letters: N made images, M real ones, D width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number
from pipeline.dist.group import Place, sum_over_ranks
from pipeline.evals._judged import Judged, JudgedConfig, halves, spread
from pipeline.evals._neighbours import blocks, nearest, parts, squared, wide


class Config(JudgedConfig):
    """Settings of precision, recall, density and coverage."""

    k: Annotated[int, Field(ge=1)] = 5
    """Neighbours that a ball reaches to."""
    real: Annotated[int, Field(ge=3)] = 10_000
    """Real images, drawn from the reference; all where it has no more. By custom as many as samples."""


class PRDC(Judged):
    """Reports "prdc/precision", "prdc/recall", "prdc/density" and "prdc/coverage".

    Of the data's own distribution, and as many made as real images, density is 1 and coverage 1 - 1 / 2^k on average,
    where features have no ties; "prdc/precision_real" and so on are those of real images and as many others, half as
    many if there are no more. Standard errors take the balls as given.
    """

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self, ctx: EvalContext) -> None:
        """A ball that reaches to k neighbours needs more than k images."""
        super().check(ctx)
        own, real = self.config, min(self.config.real, ctx.streams[self.config.reference].samples)
        if own.baseline:
            real = min(real, ctx.streams[own.reference].samples // 2)
        whole = " in half of" if own.baseline else " in"
        for count, what in ((own.samples, "samples"), (real, f"images{whole} stream {own.reference!r}")):
            if count <= own.k:
                raise ConfigError(f"prdc.k = {own.k}: there are only {count} {what}; set k lower")

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make, encode and compare; every rank its part of the samples.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: a sample is not finite.
        """
        made, real = self.both(ctx)
        compared = [("", made, spread(real, self.config.real))]
        if self.config.baseline:  # of as many images, if there are
            compared += [("_real", *halves(spread(real, 2 * self.config.real), self.config.real))]
        for what, one, other in compared:
            found = compare(one, other, self.config.k, ctx.place)
            better: Any = None if what else "higher"
            for name, values in found._asdict().items():
                mean = float(values.double().mean())
                error = float(values.double().std(correction=0)) / math.sqrt(len(values))
                samples = None if what else values.numpy()
                name = f"prdc/{name}{what}"
                yield Number(name, mean, len(values), self.config.reference, error, better, samples)


class Compared(NamedTuple):
    """Of each image; the means are what is reported."""

    precision: Tensor
    """bool[N]: the made image lies in some real image's ball."""
    recall: Tensor
    """bool[M]: the real image lies in some made image's ball."""
    density: Tensor
    """float32[N]: real balls that the made image lies in, over k."""
    coverage: Tensor
    """bool[M]: a made image lies in the real image's ball."""


def compare(made: Tensor, real: Tensor, k: int, place: Place) -> Compared:
    """Compare features [N,D] and [M,D]; memory is bounded by a block of distances.

    Args:
        made: the same on every rank.
        real: likewise.
        k: neighbours, fewer than N and M.
        place: of this rank.
    """
    reach, made_reach = (nearest(x, x, k, place, torch.arange(len(x)))[0][:, -1] for x in (real, made))
    inside = torch.zeros(len(made), dtype=torch.int64)
    recalled, covered = torch.zeros(2, len(real), dtype=torch.int64)
    for rows in blocks(len(made), place):
        query, own_reach = wide(made, rows, place), made_reach[rows].to(place.device)
        for part in parts(len(real)):
            distance = squared(query, wide(real, part, place))
            in_ball = distance <= reach[part].to(place.device)
            inside[rows] += in_ball.sum(dim=1).cpu()
            covered[part] += in_ball.any(dim=0).cpu()
            recalled[part] += (distance <= own_reach[:, None]).any(dim=0).cpu()
    inside, recalled, covered = (sum_over_ranks(counts) for counts in (inside, recalled, covered))
    return Compared(inside > 0, recalled > 0, inside.float() / k, covered > 0)
