"""Inception score: made images should each look like one class to a classifier, and all classes should come up.

Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016), with this project's classifier in place of
Inception and over all samples at once: exp of the mean KL divergence of p(class | image) from p(class).
"""

from collections.abc import Iterator

import torch

from pipeline.core.evaluation import EvalContext, Number
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._samples import OfSamples, SamplesConfig


class Config(SamplesConfig):
    """Settings of the inception score."""


class InceptionScore(OfSamples):
    """Reports "inception_score/score", from 1 to the judge's number of classes, and that number as "_classes"."""

    judges = ("judge.logits",)

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Make and classify; every rank its share.

        Raises:
            NonFiniteError: a sample is not finite.
        """
        judge = ctx.encoders["judge.logits"]
        classes = int(judge.dim)  # pyright: ignore[reportArgumentType]
        total = torch.zeros(classes + 1, dtype=torch.float64)  # of each class's probability; of p log p
        for made in self.made(ctx):
            p = judge(made.image.to(ctx.place.device)).double().softmax(dim=1).cpu()
            total += torch.cat([p.sum(dim=0), torch.special.xlogy(p, p).sum()[None]])
        n = self.config.samples
        mean = sum_over_ranks(total) / n
        known, overall = mean[-1], torch.special.xlogy(mean[:-1], mean[:-1]).sum()
        yield Number("inception_score/score", float((known - overall).exp()), n, "made")
        yield Number("inception_score/classes", classes, n, "made", better=None)
