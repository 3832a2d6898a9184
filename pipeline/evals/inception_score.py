"""Inception score: made images should each look like one class to a classifier, and all classes should come up.

Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016), with this project's classifier in place of
Inception and over all samples at once: exp of the mean KL divergence of p(class | image) from p(class).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._samples import SamplesConfig, generator_of, make


class Config(SamplesConfig):
    """Settings of the inception score."""


class InceptionScore(Evaluation):
    """Reports "inception_score/score", from 1 to the judge's number of classes, and that number as "_classes"."""

    needs = ("generator", "judge.logits")

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Make and classify; every rank its share.

        Raises:
            NonFiniteError: a sample is not finite.
        """
        judge = encoders["judge.logits"]
        classes, device = int(judge.dim), next(judge.parameters()).device  # pyright: ignore[reportArgumentType]
        total = torch.zeros(classes + 1, dtype=torch.float64)  # of each class's probability; of p log p
        for made in make(generator_of(encoders), self.config, streams):
            p = judge(made.image.to(device)).double().softmax(dim=1).cpu()
            total += torch.cat([p.sum(dim=0), torch.special.xlogy(p, p).sum()[None]])
        n = self.config.samples
        mean = sum_over_ranks(total) / n
        known, overall = mean[-1], torch.special.xlogy(mean[:-1], mean[:-1]).sum()
        yield Result("inception_score/score", float((known - overall).exp()), n, "made")
        yield Result("inception_score/classes", classes, n, "made", better=None)
