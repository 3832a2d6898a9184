"""How many bits a model of images needs for an image: exactly, or by a bound, as the model knows it.

Of diffusion models the variational bound over all noise levels: Ho et al. 2020 (https://arxiv.org/abs/2006.11239),
section 3.3 and table 1; one noise for each image and level, expected images clipped. Images must come to the model as
they are stored: set ``image.crop`` so that nothing is resampled.
Shape letters: B samples, C channels, H height, W width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, EvalStream, Evaluation, Number, Uses
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._bits import TOLD, likely, measure


class Config(Strict):
    """Settings of the likelihood."""

    test: str = "val"
    """Stream that is measured."""
    train: str = "train"
    """Stream that the baseline is fitted on."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Images to measure, drawn from the whole stream; left out: all."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """Of a diffusion process that has no number of its own, its noise levels; of a variational autoencoder the draws of
    its importance-weighted bound, in place of the bound itself."""
    seed: Annotated[int, Field(ge=0)] = 0


class Likelihood(Evaluation):
    """Reports "likelihood/bits_per_dim_KIND", so that no bound is held against what is exact unseen, and its parts.

    KIND is "exact" (flows, autoregressive models), "bound" (diffusion, with parts "_decoder", "_levels", "_prior";
    variational autoencoders, "_distortion", "_rate") or "importance_weighted_K", by K draws; see
    :class:`pipeline.core.evaluation.Bits`.

    "likelihood/histogram" is what a model needs that knows nothing but how often each value occurs at each pixel of the
    training images (counts plus one).
    """

    version = 3

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The model; which field it is told, is known with it."""
        streams = {name: ("image",) for name in (self.config.train, self.config.test)}
        return Uses(streams, ("generator",), {self.config.test: tuple(field for field in TOLD if field)})

    def check(self, ctx: EvalContext) -> None:
        """A model that knows, and steps that it can be measured in."""
        likely(ctx).check_likelihood(self.config.steps)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Measure; every rank its share.

        Raises:
            ConfigError: the suite's fields lack what the model is told.
        """
        own = self.config
        table = histogram(ctx.streams[own.train], likely(ctx).image_shape)

        def counted(image: Tensor) -> Tensor:
            return -table.gather(1, image.flatten(1).long().T).mean(dim=0)

        found = measure(ctx, own.test, counted, seed=own.seed, steps=own.steps, samples=own.samples)
        for number, (name, values) in enumerate(zip(found.names, found.bits.T, strict=True)):
            yield _mean(name, values, own.test, None if number else "lower")
        yield _mean("histogram", found.beside, own.test)


def _mean(name: str, values: Tensor, split: str, better: Literal["lower"] | None = None) -> Number:
    n, kept = len(values), values.float().numpy()
    error = float(values.std(correction=0)) / math.sqrt(n)
    return Number(f"likelihood/{name}", float(values.mean()), n, split, error, better, kept)


def histogram(stream: EvalStream, shape: tuple[int, int, int]) -> Tensor:
    """Logarithms to the base 2 of how probable each value is at each pixel: float64[C*H*W,256]."""
    counts = torch.zeros(math.prod(shape), 256, dtype=torch.int64)
    for batch in stream:
        image = batch["image"].flatten(1).long()
        counts.scatter_add_(1, image.T, torch.ones_like(image.T))
    smooth = sum_over_ranks(counts).double() + 1
    return (smooth / smooth.sum(dim=1, keepdim=True)).log2()
