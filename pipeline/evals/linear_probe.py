"""A linear classifier on frozen features: how much of the classes can be read off without changing the encoder.

Logistic regression on standardised features, as in Chen et al. (2020) and DINOv2 (Oquab et al. 2023).
"""

from collections.abc import Iterator, Mapping

from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Uses
from pipeline.dist.group import from_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._probe import Probe, ProbeConfig, check_size


class Config(ProbeConfig):
    """Settings of the linear probe."""


class LinearProbe(Evaluation):
    """Reports "linear_probe/top1", "linear_probe/top5" with at least five classes, and how the fit went.

    "linear_probe/l2" is the strength chosen, "linear_probe/l2_at_edge" is 1 where it is the first or last of the
    grid, so that a wider grid might give more, and "linear_probe/converged" is 0 where the final fit ran out of
    iterations.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What it is fitted on and what it is measured on."""
        return self.config.uses()

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"linear_probe/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Extract on all ranks, fit on the first, tell all.

        Raises:
            DataError: a training stream of fewer than two classes, or a test sample of another class.
        """
        train, test = (ctx.features("image", name) for name in (self.config.train, self.config.test))
        check_size(train, self.config.train)
        test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
        yield from from_first(self.probe(train, test) if ctx.place.first else [])

    def probe(self, train: Features, test: Features) -> list[Number]:
        """Choose the strength, fit on all of ``train`` and measure on ``test``."""
        return Probe(self.config, "linear_probe").probe(train, test)
