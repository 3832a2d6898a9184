"""Logistic regression on frozen features: how much of the classes can be read off without changing the encoder.

As Chen et al. (2020) and DINOv2 (Oquab et al. 2023) do it: features standardised, or of length 1, and L-BFGS; of 45
strengths the one is taken that does best on a tenth of the training stream, and fitted anew on all of it. The test
stream is looked at once. With two classes there are two rows of weights, as with any other number.
"""

from collections.abc import Iterator, Mapping

from pipeline.core.evaluation import EvalContext, Evaluation, Output, Uses
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._logistic import LogisticConfig, Regression
from pipeline.evals._probe import check_samples


class Config(LogisticConfig):
    """Settings of the logistic regression."""


class LogisticRegression(Evaluation):
    """Reports "logistic_regression/top1", "top5" with at least five classes, the mean recall of the classes, the table
    of confusions, and how the fit went.

    "logistic_regression/c" is the C that was chosen, "c_at_edge" is 1 where it is the first or last of those tried, so
    that others might give more, and "converged" is 0 where the last fit ran out of iterations. The table "strengths"
    says for each C what it reached on the held-out part, and how.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What it is fitted on and what it is measured on."""
        return self.config.uses()

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"logistic_regression/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks, fit on the first, tell all.

        Raises:
            DataError: too little to fit, or a test sample of a class that training lacks.
        """
        train, test = (ctx.features("image", name) for name in (self.config.train, self.config.test))
        test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
        check_samples(train, test, self.config.train, self.config.test)
        regression = Regression(self.config, "logistic_regression", ctx.place.device)
        yield from by_first(lambda: regression.measured(train, test))
