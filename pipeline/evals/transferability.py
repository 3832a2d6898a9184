"""How well features fit labels before anything is fine-tuned: LogME, N-LEEP and linear probes, block by block.

- LogME: You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning" (ICML 2021, arXiv
  2102.11005): the logarithm of the maximal evidence of a Bayesian linear model of each class's indicator, per sample.
- N-LEEP: Li et al., "Ranking Neural Network Checkpoints" (CVPR 2021): LEEP (Nguyen et al., ICML 2020, equation 2) with
  the components of a Gaussian mixture of the features' principal axes in place of source classes.
- Probes: logistic regression on the mean over places of what a block gives.

Shape letters: N samples, D width, K classes, Z components.
"""

import math
from collections.abc import Iterator
from typing import Annotated, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Output, Table, Uses
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._logistic import LogisticConfig, Regression
from pipeline.evals._probe import check_samples, statistics
from pipeline.nn.reading import block_names, offered, outputs_of, trunk

ENERGY = 0.8
"""Part of the variance that the axes hold which the mixture is fitted on, as in N-LEEP."""
EPSILON = 1e-5
"""Added to squared sums that LogME divides by, as in the authors' code: what is separable has a finite score."""


class Config(Strict):
    """Settings of the scores."""

    train: str = "train"
    """Stream that scores are computed on, and probes fitted."""
    test: str = "val"
    """Stream that probes are measured on; it decides nothing."""
    depths: Annotated[int, Field(ge=1)] = 4
    """Blocks that are looked at: so many, evenly spread, the last one among them."""
    components: Annotated[float, Field(gt=0)] = 1.0
    """Of the mixture, for each class."""
    seed: int = 0


class Transferability(Evaluation):
    """Reports "transferability/logme" and "nleep" of what the encoder itself gives; for each block that is looked at
    "transferability/top1_BLOCK" and "logme_BLOCK", also as the table "transferability/depths"; and which block has the
    highest LogME, "transferability/best_depth", as a part of the depth: 1 is the last.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Both streams, with their labels."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks, fit on the first.

        Raises:
            DataError: too little to fit, or a test sample of a class that training lacks.
        """
        own = self._pair(ctx, "image", None)
        label, classes = own[0].label, len(own[0].classes)
        count = len(label)
        yield Number(
            "transferability/logme", by_first(lambda: logme(own[0].x, label, classes)), count, self.config.train
        )
        posterior = by_first(
            lambda: mixture(own[0].x, max(2, round(self.config.components * classes)), self.config.seed)
        )
        yield Number("transferability/nleep", leep(posterior, label, classes), count, self.config.train)
        encoder = ctx.encoders["image"]
        if not offered(encoder).blocks:
            return
        names = block_names(trunk(encoder).backbone)
        asked = sorted(
            {math.ceil((place + 1) * len(names) / self.config.depths) for place in range(self.config.depths)}
        )
        scores, rows = dict[int, float](), list[list[str | float]]()
        for depth in asked:
            name = names[depth - 1]
            train, test = self._pair(ctx, f"image at {name}", AtBlock(encoder, name))
            weight, bias = self._head(ctx, train)
            hits = (test.x @ weight.T + bias).argmax(dim=1) == test.label
            scores[depth] = by_first(lambda x=train.x: logme(x, label, classes))
            top1, error = float(hits.double().mean()), float(hits.double().std()) / math.sqrt(max(1, len(hits)))
            yield Number(f"transferability/top1_{name}", top1, len(hits), self.config.test, error, samples=hits.numpy())
            yield Number(f"transferability/logme_{name}", scores[depth], count, self.config.train)
            rows.append([name, depth / len(names), top1, scores[depth]])
        best = max(scores, key=lambda depth: scores[depth]) / len(names)
        yield Number("transferability/best_depth", best, count, self.config.train, better=None)
        yield Table("transferability/depths", ("block", "depth", "top1", "logme"), rows, self.config.test)

    def _pair(self, ctx: EvalContext, name: str, module: nn.Module | None) -> tuple[Features, Features]:
        """Features of both streams, in the classes of the first."""
        train, test = (ctx.features(name, stream, module=module) for stream in (self.config.train, self.config.test))
        test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
        check_samples(train, test, self.config.train, self.config.test)
        return train, test

    def _head(self, ctx: EvalContext, train: Features) -> tuple[Tensor, Tensor]:
        """A probe, whose strength is chosen on a tenth of the training features."""
        regression = Regression(LogisticConfig(c=(1e-3, 1e-2, 0.1, 1.0, 10.0)), "transferability", ctx.place.device)
        return by_first(lambda: regression.head(train))


class AtBlock(nn.Module):
    """uint8[B,C,H,W] to the mean over places of what a block gives, float[B,D]."""

    def __init__(self, encoder: nn.Module, block: str) -> None:
        super().__init__()
        self.encoder, self.block = encoder, block

    def forward(self, image: Tensor) -> Tensor:
        """Run the whole encoder, and take what its block gives."""
        with outputs_of(trunk(self.encoder).backbone, [self.block]) as found:
            self.encoder(image)
        return found[self.block].mean(dim=(2, 3))


def logme(x: Tensor, label: Tensor, classes: int, rounds: int = 100) -> float:
    """The mean over classes of the maximal log-evidence per sample, in float64.

    Args:
        x: features, [N,D].
        label: int64[N].
        classes: K; those without a sample count, too.
        rounds: of the fixed-point iteration, at most.
    """
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    target = functional.one_hot(label, classes).double()
    n, sigma = len(x), s.square()[:, None]
    z = (u.T @ target).square()
    rest = (target.square().sum(dim=0) - z.sum(dim=0)).clamp_min(0)
    alpha, beta = torch.ones(classes).double(), torch.ones(classes).double()
    for _ in range(rounds):
        ratio = alpha / beta
        used = (sigma / (sigma + ratio)).sum(dim=0)
        size = (sigma * z / (ratio + sigma).square()).sum(dim=0)
        error = (z / (1 + sigma / ratio).square()).sum(dim=0) + rest
        alpha, beta = used / (size + EPSILON), (n - used) / (error + EPSILON)
        if ((alpha / beta - ratio).abs() <= 1e-6 * ratio).all():
            break
    # Directions in which no feature varies cancel: alpha^D / det has alpha once for each that one varies in.
    evidence = (alpha.log() - (alpha + beta * sigma).log()).sum(dim=0) / 2 + n / 2 * (
        beta.log() - math.log(2 * math.pi)
    )
    evidence = evidence - beta / 2 * error - alpha / 2 * size
    return float((evidence / n).mean())


def leep(posterior: Tensor, label: Tensor, classes: int) -> float:
    """The mean log-likelihood of labels y under sum over z of P(y | z) P(z | x), with P(y | z) from the same samples.

    Args:
        posterior: P(z | x), float[N,Z], rows that sum to one.
        label: int64[N].
        classes: K.
    """
    joint = functional.one_hot(label, classes).double().T @ posterior.double() / len(label)
    given = joint / joint.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return float((posterior.double() @ given.T)[torch.arange(len(label)), label].log().mean())


def mixture(x: Tensor, components: int, seed: int) -> Tensor:
    """P(z | x) of a Gaussian mixture on the principal axes of [N,D] that hold most of the variance, float64[N,Z]."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    mean, std = statistics(x.double())
    flat = ((x.double() - mean) / std).cpu().numpy()
    reduced = cast("np.ndarray", PCA(ENERGY, svd_solver="full").fit_transform(flat))
    model = GaussianMixture(min(components, len(x) // 2), covariance_type="diag", reg_covar=1e-3, random_state=seed)
    return torch.from_numpy(model.fit(reduced).predict_proba(reduced))
