"""How many bits a diffusion model needs for an image: the variational bound over all noise levels.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), section 3.3 and table 1; one noise for each image and level, expected
images clipped. Images must come to the model as they are stored: set ``image.crop`` so that nothing is resampled.
Shape letters: B samples, C channels, H height, W width.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, EvalStream, Evaluation, Result
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._features import named_stream
from pipeline.evals._samples import chosen, generator_of
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

    needs = ("generator",)

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Measure; every rank its share.

        Raises:
            ConfigError: an unknown stream, or steps that do not fit the process.
        """
        test = named_stream(streams, self.config.test, "likelihood.test")
        train = named_stream(streams, self.config.train, "likelihood.train")
        generator = generator_of(encoders)
        device = next(generator.parameters()).device
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
        yield Result("likelihood/bits_per_dim", mean, count, split, stderr, better="lower")
        for name, value in zip(("decoder", "levels", "prior"), parts, strict=True):
            yield Result(f"likelihood/bits_per_dim_{name}", value / n, count, split, better=None)
        yield Result("likelihood/histogram", self._baseline(test, table), count, split, better=None)

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
    reader = generator.denoiser.reader
    field = "text" if reader is not None else "label" if generator.classes else None
    if field is None:
        return None
    if field not in batch:
        raise ConfigError(f'the model is told "{field}"; add it to the suite\'s fields')
    return Text(batch["text"], batch["text_length"]) if reader is not None else batch["label"]


def histogram(stream: EvalStream, shape: tuple[int, int, int]) -> Tensor:
    """Logarithms to the base 2 of how probable each value is at each pixel: float64[C*H*W,256]."""
    counts = torch.zeros(math.prod(shape), 256, dtype=torch.int64)
    for batch in stream:
        image = batch["image"].flatten(1).long()
        counts.scatter_add_(1, image.T, torch.ones_like(image.T))
    smooth = sum_over_ranks(counts).double() + 1
    return (smooth / smooth.sum(dim=1, keepdim=True)).log2()
