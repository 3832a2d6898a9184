"""Whether a classifier's confidence is the share of times that it is right.

- Expected calibration error in bins of equal width: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017),
  section 2 (15 bins, the confidence of the predicted class).
- Brier score over all classes: Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950).
- Temperature scaling, section 4.2 of Guo et al.: one number, fitted on another stream by the likelihood.

Shape letters: N samples, K classes.
"""

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._classes import in_classes_of

EDGES = (1e-2, 1e2)
"""Least and largest temperature that is tried."""


class Config(Strict):
    """Settings of the calibration."""

    test: str = "val"
    """Stream that is classified."""
    fit: str | None = None
    """Another stream, on which the temperature is fitted; left out: none is."""
    bins: Annotated[int, Field(ge=1)] = 15


class Calibration(Evaluation):
    """Reports "calibration/ece", "calibration/brier" and "calibration/nll"; with ``fit`` also "calibration/temperature"
    and the three at that temperature, "calibration/ece_scaled" and so on.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The classifier, what it is measured on, and what its temperature is fitted on."""
        streams = [self.config.test, *([self.config.fit] if self.config.fit else [])]
        return Uses({name: ("image", "label") for name in streams}, ("logits",))

    def check(self, ctx: EvalContext) -> None:
        """A temperature is not fitted on what it is measured on."""
        if self.config.fit is None:
            return
        if ctx.streams[self.config.fit].fingerprint == ctx.streams[self.config.test].fingerprint:
            raise ConfigError(
                f"calibration.fit: stream {self.config.fit!r} is the data that is measured on; a temperature that is "
                "fitted there says nothing, so name another stream, or leave it out"
            )

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Classify on all ranks, and measure what all know.

        Raises:
            DataError: a sample is of a class that the classifier was not trained on.
        """
        logits, label = self._classified(ctx, self.config.test)
        yield from self.measure(logits, label, "")
        if self.config.fit is not None:
            other, labels = self._classified(ctx, self.config.fit)
            chosen = temperature(other, labels)
            yield Number("calibration/temperature", chosen, len(other), self.config.fit, better=None)
            yield from self.measure(logits / chosen, label, "_scaled")

    def _classified(self, ctx: EvalContext, stream: str) -> tuple[Tensor, Tensor]:
        found = ctx.features("logits", stream)
        return found.x.double(), in_classes_of(found, ctx.classes["logits"], stream, "the classifier").label

    def measure(self, logits: Tensor, label: Tensor, suffix: str) -> Iterator[Number]:
        """The three numbers of logits float64[N,K]; names end in ``suffix``."""
        p, n = logits.softmax(dim=1), len(label)
        brier = (p - functional.one_hot(label, p.shape[1])).square().sum(dim=1)
        surprise = functional.cross_entropy(logits, label, reduction="none")
        error = calibration_error(p, label, self.config.bins)
        yield Number(f"calibration/ece{suffix}", error, n, self.config.test, better="lower")
        for name, values in ((f"brier{suffix}", brier), (f"nll{suffix}", surprise)):
            value, spread = float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None
            each = values.float().numpy()
            yield Number(f"calibration/{name}", value, n, self.config.test, spread, better="lower", samples=each)


def calibration_error(p: Tensor, label: Tensor, bins: int) -> float:
    """sum over bins of n_b / N |share that is right - mean confidence|, bins (i/B, (i+1)/B] of the confidence.

    Args:
        p: probabilities float64[N,K].
        label: int64[N].
        bins: B.
    """
    confidence, predicted = p.max(dim=1)
    place = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    gap = p.new_zeros(bins).index_add_(0, place, (predicted == label).to(p) - confidence)
    return float(gap.abs().sum()) / len(label)


def temperature(logits: Tensor, label: Tensor) -> float:
    """The number that logits float64[N,K] are divided by for the best likelihood of int64[N]; see :data:`EDGES`."""

    def cost(log_t: float) -> float:
        return float(functional.cross_entropy(logits / math.exp(log_t), label))

    found = minimize_scalar(cost, bounds=[math.log(edge) for edge in EDGES], method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
