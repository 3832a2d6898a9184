"""A linear classifier on frozen features: how much of the classes can be read off without changing the encoder.

Multinomial logistic regression, as in Chen et al. (2020) and DINOv2 (Oquab et al. 2023), on standardised features
(the BatchNorm without scale that MAE puts before its probe). Its strength is chosen on a tenth of the training stream
that the fit does not see; the test stream is looked at once. The optimizer is SciPy's L-BFGS; the loss and its gradient
are torch's, on the encoder's device, which is several times faster than scikit-learn's LogisticRegression on many
classes (`python -m tests.perf.linear_probe`).
Shape letters: N samples, D width, K classes.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import numpy as np
import scipy.optimize
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import from_first
from pipeline.evals._features import Features, extract, named_stream

HELD_OUT = 10
"""One in so many training samples chooses the strength."""


class Config(Strict):
    """Settings of the linear probe."""

    train: str = "train"
    """Stream that it is fitted on."""
    test: str = "val"
    """Stream that it is measured on."""
    l2: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Strengths to choose from: the factor of half the squared weights beside the mean cross-entropy."""
    max_iterations: Annotated[int, Field(ge=1)] = 200


class LinearProbe(Evaluation):
    """Reports "linear_probe/top1", "linear_probe/top5" with at least five classes, and how the fit went.

    "linear_probe/l2" is the strength chosen, "linear_probe/l2_at_edge" is 1 where it is the first or last of the
    grid, so that a wider grid might give more, and "linear_probe/converged" is 0 where the final fit ran out of
    iterations.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Extract on all ranks, fit on the first, tell all.

        Raises:
            DataError: a training stream of fewer than two classes.
        """
        device = next(encoders["image"].parameters(), torch.empty(0)).device
        train = extract(encoders["image"], named_stream(streams, self.config.train, "linear_probe.train"))
        test = extract(encoders["image"], named_stream(streams, self.config.test, "linear_probe.test"))
        if len(train.label.unique()) < 2 or len(train.x) < 2 * HELD_OUT:
            raise DataError(
                f"stream {self.config.train!r} has {len(train.x)} samples of {len(train.label.unique())} classes; "
                f"a linear probe needs two classes and {2 * HELD_OUT} samples"
            )
        yield from from_first(self.probe(train.to(device), test.to(device)) if dist.get_rank() == 0 else [])

    def probe(self, train: Features, test: Features) -> list[Result]:
        """Choose the strength, fit on all of ``train`` and measure on ``test``."""
        grid = sorted(self.config.l2, reverse=True)
        l2 = grid[0] if len(grid) == 1 else self._choose(train, grid)
        mean, std = _statistics(train.x)
        start = torch.zeros(train.x.shape[1] + 1, train.classes, dtype=torch.float64)
        weights, converged = self._fit(start, (train.x - mean) / std, train.label, l2)
        weights[-1, train.label.bincount(minlength=train.classes) == 0] = -math.inf  # never seen, so never predicted
        scores = _scores(weights, (test.x - mean) / std)
        best = scores.topk(min(5, train.classes), dim=1).indices == test.label[:, None]
        n = len(test.x)
        results = []
        for name, k in (("top1", 1), ("top5", 5)):
            if k <= train.classes:
                p = int(best[:, :k].sum()) / n
                results.append(Result(f"linear_probe/{name}", p, n, self.config.test, math.sqrt(p * (1 - p) / n)))
        edge = len(grid) > 1 and l2 in (grid[0], grid[-1])
        facts = {"l2": l2, "l2_at_edge": float(edge), "converged": float(converged)}
        return results + [
            Result(f"linear_probe/{name}", value, len(train.x), self.config.train, better=None)
            for name, value in facts.items()
        ]

    def _choose(self, train: Features, grid: list[float]) -> float:
        """The strength that classifies the held-out tenth best; of equals the strongest."""
        order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
        held, rest = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
        mean, std = _statistics(train.x[rest])
        x, held_x = (train.x[rest] - mean) / std, (train.x[held] - mean) / std
        weights = torch.zeros(x.shape[1] + 1, train.classes, dtype=torch.float64)
        best, chosen = -1, grid[0]
        for l2 in grid:  # from the strongest, each starting where the last one ended
            weights, _ = self._fit(weights, x, train.label[rest], l2)
            hits = int((_scores(weights, held_x).argmax(dim=1) == train.label[held]).sum())
            if hits > best:
                best, chosen = hits, l2
        return chosen

    def _fit(self, start: Tensor, x: Tensor, label: Tensor, l2: float) -> tuple[Tensor, bool]:
        """Minimise the mean cross-entropy plus l2 / 2 times the squared weights (the bias goes free).

        Args:
            start: float64[D+1,K], the weights and, last, the bias to start from.
            x: float32[N,D].
            label: int64[N].
            l2: strength.

        Returns:
            float64[D+1,K], and whether the optimizer converged.
        """
        rows = torch.arange(len(x), device=x.device)

        def cost(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            w = torch.from_numpy(flat).to(x).view(start.shape)
            log_p = (x @ w[:-1] + w[-1]).log_softmax(dim=1)
            loss = -log_p[rows, label].double().mean() + l2 / 2 * w[:-1].double().square().sum()
            residual = log_p.exp_()
            residual[rows, label] -= 1
            residual /= len(x)
            gradient = torch.cat([x.T @ residual + l2 * w[:-1], residual.sum(dim=0, keepdim=True)])
            return float(loss), gradient.double().cpu().numpy().ravel()

        found = scipy.optimize.minimize(
            cost,
            start.numpy().ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": self.config.max_iterations, "gtol": 1e-5},
        )
        return torch.from_numpy(found.x).view(start.shape), found.status == 0


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, as MAE's BatchNorm takes them (eps 1e-6 inside the root)."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def _scores(weights: Tensor, x: Tensor) -> Tensor:
    """Logits float32[N,K]."""
    w = weights.to(x)
    return x @ w[:-1] + w[-1]
