"""Does a classifier see in a made image the class that was asked for?

Ravuri and Vinyals, "Classification Accuracy Score for Conditional Generative Models" (NeurIPS 2019), asks how well a
classifier trained on made images does on real ones; this is the cheap converse, a classifier trained on real images.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._samples import SamplesConfig, generator_of, make


class Config(SamplesConfig):
    """Settings of the agreement."""


class Agreement(Evaluation):
    """Reports "agreement/top1", the part of the images in which the judge sees the class that was asked for."""

    needs = ("generator", "judge.logits")

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Make and classify; every rank its share.

        Raises:
            ConfigError: a model without classes.
            NonFiniteError: a sample is not finite.
        """
        generator, judge = generator_of(encoders), encoders["judge.logits"]
        if generator.classes == 0:
            raise ConfigError('evaluation "agreement" needs a model that was trained with condition = "class"')
        device = next(judge.parameters()).device
        hits = torch.zeros((), dtype=torch.int64)
        for image, label in make(generator, self.config, streams):
            assert label is not None
            hits += (judge(image.to(device)).argmax(dim=1).cpu() == label).sum()
        n = self.config.samples
        p = int(sum_over_ranks(hits)) / n
        yield Result("agreement/top1", p, n, "made", math.sqrt(p * (1 - p) / n))
