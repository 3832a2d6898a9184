"""Multinomial logistic regression by L-BFGS, its strength chosen on a held-out part of the training features.

W and b minimise C sum_n CE(W x_n + b, y_n) + |W|^2 / 2, as scikit-learn has it, with the sum divided by C N. The
parameters that L-BFGS sees are those along the principal axes of the features, each multiplied by the root of about its
curvature, which is (1 / K) times the variance there + 1 / (C N): features of networks vary by orders of magnitude more
along some directions than along others, and this way it takes a third of the steps and less. The same scaling makes the
tolerance mean the same for all features: half the square of the scaled gradient is about what the mean loss can still
fall by. SciPy steps; loss and gradient come from torch, on the device of the features.
Shape letters: N samples, D width, K classes.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import scipy.optimize
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.evaluation import Features, Number, Output, Table, Uses
from pipeline.evals._classified import classified, guesses
from pipeline.evals._probe import Rates, Scale, held_out, scaled, statistics

STRENGTHS = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
"""C of DINOv2: 45 from 1e-6 to 1e5."""
UNSEEN = -1e4
"""Bias of a class without samples, where a head must have finite weights."""


class LogisticConfig(Strict):
    """Settings of a logistic regression."""

    train: str = "train"
    """Stream that it is fitted on."""
    test: str = "val"
    """Stream that it is measured on."""
    c: Rates | None = None
    """Values of C to choose from, the inverse of the strength; left out: 45 from 1e-6 to 1e5, as DINOv2."""
    l2: Rates | None = None
    """In place of ``c``: factors of half the squared weights beside the mean cross-entropy; C is 1 / (l2 N)."""
    scale: Scale = "standardise"
    """What is done to the features: "standardise" each feature, "normalise" the length of each sample, "none"."""
    precision: Literal["fp32", "fp64"] = "fp64"
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Fitted when no part of the gradient, scaled to unit curvature, is larger."""
    max_iterations: Annotated[int, Field(ge=1)] = 1000

    @model_validator(mode="after")
    def _one_of_two(self) -> "LogisticConfig":
        if self.c is not None and self.l2 is not None:
            raise ValueError("'c' and 'l2' say the same thing in two ways; set one of them")
        return self

    def uses(self) -> Uses:
        """Both streams, with their labels."""
        return Uses({name: ("image", "label") for name in (self.train, self.test)})

    def strengths(self, samples: int) -> list[float]:
        """Values of C for so many samples, the strongest regularisation first."""
        return sorted(self.c or STRENGTHS) if self.l2 is None else sorted(1 / (l2 * samples) for l2 in self.l2)


class Fitted(NamedTuple):
    """A classifier, and how it was found."""

    weight: Tensor
    """[K,D]."""
    bias: Tensor
    """[K]."""
    iterations: int
    converged: bool


class Axes(NamedTuple):
    """Principal axes of features, made once for every strength."""

    x: Tensor
    """The features along them, [N,D]."""
    variance: Tensor
    """[D], about zero."""
    turn: Tensor
    """[D,D]; a column is an axis."""


def axes(x: Tensor) -> Axes:
    """Of features [N,D]."""
    variance, turn = torch.linalg.eigh(x.T @ x / len(x))
    return Axes(x @ turn, variance.clamp_min(0), turn)


def fit(
    known: Axes, label: Tensor, classes: int, c: float, tolerance: float, max_iterations: int, start: Fitted | None
) -> Fitted:
    """Fit one strength.

    Args:
        known: the features.
        label: int64[N], on their device.
        classes: K.
        c: inverse strength.
        tolerance: of the scaled gradient.
        max_iterations: of L-BFGS.
        start: where to begin; None: at zero.
    """
    n, d = known.x.shape
    scale = (known.variance / classes + 1 / (c * n)).rsqrt()
    own = math.sqrt(classes)  # of the bias, whose feature is one
    places = torch.arange(n, device=label.device)

    def whole(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(flat).to(known.x)
        return values[: classes * d].view(classes, d) * scale, values[classes * d :] * own

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = whole(flat)
        scores = torch.addmm(bias, known.x, weight.T)
        norm = scores.logsumexp(dim=1)
        loss = float((norm - scores[places, label]).double().mean())
        wrong = scores.sub_(norm[:, None]).exp_()
        wrong[places, label] -= 1
        slope = (wrong.T @ known.x / n + weight / (c * n)) * scale
        gradient = torch.cat([slope.flatten(), wrong.mean(dim=0) * own])
        return loss + float((weight.double() ** 2).sum()) / (2 * c * n), gradient.double().cpu().numpy()

    first = np.zeros(classes * (d + 1))
    if start is not None:
        first = torch.cat([(start.weight @ known.turn / scale).flatten(), start.bias / own]).double().cpu().numpy()
    options = {"maxiter": max_iterations, "maxfun": 20 * max_iterations, "maxls": 50, "gtol": tolerance}
    options["ftol"] = torch.finfo(known.x.dtype).eps
    found = scipy.optimize.minimize(cost, first, jac=True, method="L-BFGS-B", options=options)
    weight, bias = whole(found.x)
    return Fitted(weight @ known.turn.T, bias, int(found.nit), found.status == 0)


class Tried(NamedTuple):
    """A strength, and how it did on the held-out part."""

    c: float
    top1: float
    model: Fitted


class Regression:
    """Fits and measures; names of results begin with ``name``.

    Args:
        config: what is tried, and how.
        name: of the evaluation.
        device: that computes.
    """

    def __init__(self, config: LogisticConfig, name: str, device: torch.device) -> None:
        self.config, self.name, self.device = config, name, device
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32

    def measured(self, train: Features, test: Features) -> list[Output]:
        """Choose the strength, fit on all of ``train`` and measure on ``test``, which is in the same classes."""
        n, config = len(train.x), self.config
        best, tried, seen, model = self._chosen(train)
        _, test_x = self._scaled(train.x, test.x)
        scores = torch.full((len(test_x), len(train.classes)), -math.inf)
        scores[:, seen] = (test_x @ model.weight.T + model.bias).float().cpu()
        grid = config.strengths(n)
        edge = len(grid) > 1 and best in (0, len(grid) - 1)
        facts = {"c": grid[best], "c_at_edge": float(edge), "converged": float(model.converged)}
        return [
            *classified(self.name, guesses(scores), test.label, train.classes, config.test),
            *(Number(f"{self.name}/{key}", value, n, config.train, better=None) for key, value in facts.items()),
            *([self._table(tried)] if tried else []),
        ]

    def head(self, train: Features) -> tuple[Tensor, Tensor]:
        """Choose the strength and fit on all of ``train``: weight [K,D] and bias [K] for features as they are.

        A class that ``train`` has no sample of scores far below all others.
        """
        assert self.config.scale == "standardise"
        _, _, seen, model = self._chosen(train)
        mean, std = statistics(train.x.to(self.device, self.dtype))
        weight = model.weight / std
        bias = model.bias - weight @ mean
        whole = weight.new_zeros(len(train.classes), train.x.shape[1]), bias.new_full((len(train.classes),), UNSEEN)
        for own, found in zip(whole, (weight, bias), strict=True):
            own[seen.to(self.device)] = found
        return whole[0].float().cpu(), whole[1].float().cpu()

    def _chosen(self, train: Features) -> tuple[int, list[Tried], Tensor, Fitted]:
        """The best strength's number, what was tried, the classes that occur, and the fit on all of ``train``."""
        config, grid = self.config, self.config.strengths(len(train.x))
        tried = self._sweep(train) if len(grid) > 1 else []
        best = max(range(len(grid)), key=lambda i: tried[i].top1 if tried else 0.0)  # of equals the strongest
        x, _ = self._scaled(train.x, train.x[:0])
        seen, label = self._classes(train.label)
        start = tried[best].model if tried and len(tried[best].model.bias) == len(seen) else None
        model = fit(axes(x), label, len(seen), grid[best], config.tolerance, config.max_iterations, start)
        return best, tried, seen, model

    def _sweep(self, train: Features) -> list[Tried]:
        """Fit every strength, each from where the last one ended, and measure it on the held-out part."""
        config, (held, rest) = self.config, held_out(len(train.x))
        x, held_x = self._scaled(train.x[rest], train.x[held])
        seen, label = self._classes(train.label[rest])
        known, truth, model = axes(x), train.label[held], None
        tried: list[Tried] = []
        for c in config.strengths(len(rest)):
            model = fit(known, label, len(seen), c, config.tolerance, config.max_iterations, model)
            guess = seen[(held_x @ model.weight.T + model.bias).argmax(dim=1).cpu()]
            tried.append(Tried(c, float((guess == truth).double().mean()), model))
        return tried

    def _scaled(self, known: Tensor, other: Tensor) -> list[Tensor]:
        return scaled(self.config.scale, *(x.to(self.device, self.dtype) for x in (known, other)))

    def _classes(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the classes that occur, and the place of each label's among them, on the device."""
        seen, places = label.unique(return_inverse=True)
        return seen, places.to(self.device)

    def _table(self, tried: Sequence[Tried]) -> Table:
        columns = ["C", "held-out top-1", "iterations", "converged"]
        cells = [[t.c, t.top1, t.model.iterations, int(t.model.converged)] for t in tried]
        return Table(f"{self.name}/strengths", columns, cells, self.config.train)
