"""Does a classifier see in a made image the class that was asked for?

Ravuri and Vinyals, "Classification Accuracy Score for Conditional Generative Models" (NeurIPS 2019), asks how well a
classifier trained on made images does on real ones ("classification_accuracy"); this is the cheap converse, a
classifier trained on real images.
"""

from collections.abc import Iterator, Mapping

from pipeline.core.evaluation import EvalContext, Output
from pipeline.evals._classes import renumbered
from pipeline.evals._classified import classified, guesses
from pipeline.evals._samples import OfSamples, SamplesConfig, check_told_classes


class Config(SamplesConfig):
    """Settings of the agreement."""


class Agreement(OfSamples):
    """Reports "agreement/top1", the part of the images in which the judge sees the class that was asked for; with at
    least five classes "top5"; the mean over classes, and the table of which were taken for which.
    """

    judges = ("judge.logits",)

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """Of a generator that is deaf, and of one that does as it is told."""
        return {"agreement/top1": (1 / classes, 1.0)}

    def check(self, ctx: EvalContext) -> None:
        """Only a model that is asked for classes can agree."""
        super().check(ctx)
        check_told_classes(ctx, "agreement")

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Make and classify; every rank its share.

        Raises:
            DataError: the judge does not know the classes that were asked for.
            NonFiniteError: a sample is not finite.
        """
        _, logits, label = self.judged(ctx, "judge.logits")
        assert label is not None
        asked = renumbered(label, ctx.classes["generator"], ctx.classes["judge.logits"], "the model", "the judge")
        yield from classified("agreement", guesses(logits), asked, ctx.classes["judge.logits"], "made")
