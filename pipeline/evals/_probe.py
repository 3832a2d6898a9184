"""A linear classifier on features, fitted: what the evaluations that probe share.

Multinomial logistic regression, as in Chen et al. (2020) and DINOv2 (Oquab et al. 2023), on standardised features
(the BatchNorm without scale that MAE puts before its probe). Its strength is chosen on a tenth of the training stream
that the fit does not see; the test stream is looked at once. scikit-learn's L-BFGS in float32 fits 20,000 features of
width 192 to 200 classes over all six strengths in 6 s on one core (torch's L-BFGS on the same data: 16 s).
"""

import math
import warnings
from typing import Annotated

import torch
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features, Number, Uses

HELD_OUT = 10
"""One in so many training samples chooses the strength."""


class ProbeConfig(Strict):
    """Settings of the linear probe."""

    train: str = "train"
    """Stream that it is fitted on."""
    test: str = "val"
    """Stream that it is measured on."""
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Strengths to choose from: the factor of half the squared weights beside the mean cross-entropy."""
    max_iterations: Annotated[int, Field(ge=1)] = 200

    def uses(self) -> Uses:
        """Both streams, with their labels."""
        return Uses({name: ("image", "label") for name in (self.train, self.test)})


class Probe:
    """Fits and measures; names of results begin with ``name``."""

    def __init__(self, config: ProbeConfig, name: str) -> None:
        self.config, self.name = config, name

    def probe(self, train: Features, test: Features) -> list[Number]:
        """Choose the strength, fit on all of ``train`` and measure on ``test``."""
        grid = sorted(self.config.l2, reverse=True)
        l2 = grid[0] if len(grid) == 1 else self._choose(train, grid)
        mean, std = _statistics(train.x)
        model, converged = self._fit(None, (train.x - mean) / std, train.label, l2)
        classes = len(train.classes)
        scores = _scores(model, (test.x - mean) / std, classes)
        best = scores.topk(min(5, classes), dim=1).indices == test.label[:, None]
        n = len(test.x)
        results = []
        for name, k in (("top1", 1), ("top5", 5)):
            if k <= classes:
                p = int(best[:, :k].sum()) / n
                results.append(Number(f"{self.name}/{name}", p, n, self.config.test, math.sqrt(p * (1 - p) / n)))
        edge = len(grid) > 1 and l2 in (grid[0], grid[-1])
        facts = {"l2": l2, "l2_at_edge": float(edge), "converged": float(converged)}
        return results + [
            Number(f"{self.name}/{name}", value, len(train.x), self.config.train, better=None)
            for name, value in facts.items()
        ]

    def _choose(self, train: Features, grid: list[float]) -> float:
        """The strength that classifies the held-out tenth best; of equals the strongest."""
        order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
        held, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
        mean, std = _statistics(train.x[rest])
        x, held_x = (train.x[rest] - mean) / std, (train.x[held] - mean) / std
        model, best, chosen = None, -1, grid[0]
        for l2 in grid:  # from the strongest, each starting where the last one ended
            model, _ = self._fit(model, x, train.label[rest], l2)
            hits = int((_scores(model, held_x, len(train.classes)).argmax(dim=1) == train.label[held]).sum())
            if hits > best:
                best, chosen = hits, l2
        return chosen

    def _fit(
        self, start: LogisticRegression | None, x: Tensor, label: Tensor, l2: float
    ) -> tuple[LogisticRegression, bool]:
        """Fit, from where ``start`` ended if there is one; returns the model and whether it converged."""
        model = start or LogisticRegression(max_iter=self.config.max_iterations, warm_start=True)
        model.set_params(C=1 / (l2 * len(x)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x.numpy(), label.numpy())
        return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def check_size(train: Features, stream: str) -> None:
    """Hold a training stream against what a probe needs.

    Raises:
        DataError: fewer than two classes, or too few samples.
    """
    if len(train.label.unique()) < 2 or len(train.x) < 2 * HELD_OUT:
        raise DataError(
            f"stream {stream!r} has {len(train.x)} samples of {len(train.label.unique())} classes; "
            f"a linear probe needs two classes and {2 * HELD_OUT} samples"
        )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, as MAE's BatchNorm takes them (eps 1e-6 inside the root)."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def _scores(model: LogisticRegression, x: Tensor, classes: int) -> Tensor:
    """Scores float32[N,K]; a class that the model has not seen scores -inf."""
    seen = torch.from_numpy(model.decision_function(x.numpy())).float()
    if seen.ndim == 1:  # two classes: one score, of the second
        seen = torch.stack([-seen, seen], dim=1)
    return seen.new_full((len(x), classes), -math.inf).index_copy_(1, torch.from_numpy(model.classes_), seen)
