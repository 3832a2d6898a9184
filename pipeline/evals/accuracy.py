"""How often a classifier that was trained with its encoder is right: for fine-tuning and supervised training.

One view per image, in the suite's geometry; no ensembling.
"""

from collections.abc import Iterator, Mapping

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, Evaluation, Output, Uses
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import classified, guesses


class Config(Strict):
    """Settings of the accuracy."""

    test: str = "val"
    """Stream that is classified."""


class Accuracy(Evaluation):
    """Reports "accuracy/top1", with at least five classes "accuracy/top5", "accuracy/mean_per_class_recall", and
    the table "accuracy/confusion" of at most fifty classes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The classifier and the stream."""
        return Uses({self.config.test: ("image", "label")}, ("logits",))

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"accuracy/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Classify on all ranks and count.

        Raises:
            DataError: a sample is of a class that the classifier was not trained on.
        """
        known = ctx.classes["logits"]
        found = ctx.features("logits", self.config.test)
        label = in_classes_of(found, known, self.config.test, "the classifier").label
        yield from classified("accuracy", guesses(found.x), label, known, self.config.test)
