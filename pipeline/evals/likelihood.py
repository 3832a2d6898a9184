"""How many bits a diffusion model needs for an image: the variational bound over all noise levels.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), section 3.3 and table 1; one noise for each image and level, expected
images clipped. Images must come to the model as they are stored: set ``image.crop`` so that nothing is resampled.
Shape letters: B samples, C channels, H height, W width.
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, EvalStream, Evaluation, Number, Uses
from pipeline.core.protocols import Batch
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._denoiser import denoiser_of
from pipeline.evals._samples import chosen
from pipeline.nn.conditioning import Prompt, Text
from pipeline.nn.diffusion.model import Generator


class Config(Strict):
    """Settings of the likelihood."""

    test: str = "val"
    """Stream that is measured."""
    train: str = "train"
    """Stream that the baseline is fitted on."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Images to measure, about evenly from the whole stream; left out: all."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """Noise levels; of a process that has no number of its own."""
    seed: Annotated[int, Field(ge=0)] = 0


class Likelihood(Evaluation):
    """Reports "likelihood/bits_per_dim" and its parts "_decoder", "_levels" and "_prior".

    "likelihood/histogram" is what a model needs that knows nothing but how often each value occurs at each pixel of the
    training images (counts plus one).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The denoiser; the field that it is told is known with the model."""
        return Uses({name: ("image",) for name in (self.config.train, self.config.test)}, ("generator",))

    def check(self, ctx: EvalContext) -> None:
        """Steps that fit the process."""
        denoiser_of(ctx).process.likelihood_chain(self.config.steps)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Measure; every rank its share.

        Raises:
            ConfigError: the suite's fields lack what the model is told.
        """
        test, train = ctx.streams[self.config.test], ctx.streams[self.config.train]
        generator, device = denoiser_of(ctx), ctx.place.device
        table = histogram(train, generator.image_shape)
        total = torch.zeros(6, dtype=torch.float64)
        for batch in test:
            mine = self._chosen(batch["id"], test.samples)
            if not mine.any():
                continue
            part = {name: value[mine].to(device) for name, value in batch.items()}
            prompt = _prompt(generator, part)
            terms = generator.bits(part["image"], part["id"], prompt, self.config.seed, self.config.steps).cpu()
            bits = terms.sum(dim=1)
            parts = (terms[:, 0], terms[:, 1:-1].sum(dim=1), terms[:, -1])
            rows = [torch.ones_like(bits), bits, bits**2, *parts]
            total[:6] += torch.stack([row.sum() for row in rows])
        n, bits, squares, *parts = sum_over_ranks(total).tolist()
        mean = bits / n
        stderr = math.sqrt(max(0.0, squares / n - mean**2) / n)
        count, split = int(n), self.config.test
        yield Number("likelihood/bits_per_dim", mean, count, split, stderr, better="lower")
        for name, value in zip(("decoder", "levels", "prior"), parts, strict=True):
            yield Number(f"likelihood/bits_per_dim_{name}", value / n, count, split, better=None)
        yield Number("likelihood/histogram", self._baseline(test, table), count, split, better=None)

    def _chosen(self, ids: Tensor, size: int) -> Tensor:
        """Which samples are measured, bool[B]: a function of their numbers alone."""
        wanted = size if self.config.samples is None else min(size, self.config.samples)
        return chosen(ids, size, wanted)

    def _baseline(self, test: EvalStream, table: Tensor) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        for batch in test:
            image = batch["image"][self._chosen(batch["id"], test.samples)].flatten(1).long()
            total[0] += len(image)
            total[1] -= table.gather(1, image.T).mean(dim=0).sum()
        n, bits = sum_over_ranks(total).tolist()
        return bits / n


def _prompt(generator: Generator, batch: Batch) -> Prompt | None:
    """What the images of a batch are of.

    Raises:
        ConfigError: the suite's fields lack it.
    """
    if generator.told is None:
        return None
    if generator.told not in batch:
        raise ConfigError(f'the model is told "{generator.told}"; add it to the suite\'s fields')
    return Text(batch["text"], batch["text_length"]) if generator.told == "text" else batch["label"]


def histogram(stream: EvalStream, shape: tuple[int, int, int]) -> Tensor:
    """Logarithms to the base 2 of how probable each value is at each pixel: float64[C*H*W,256]."""
    counts = torch.zeros(math.prod(shape), 256, dtype=torch.int64)
    for batch in stream:
        image = batch["image"].flatten(1).long()
        counts.scatter_add_(1, image.T, torch.ones_like(image.T))
    smooth = sum_over_ranks(counts).double() + 1
    return (smooth / smooth.sum(dim=1, keepdim=True)).log2()
