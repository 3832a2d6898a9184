"""How often a classifier is right on damaged images: ImageNet-C's corruptions at five severities, rendered on the fly.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (ICLR 2019);
see :mod:`pipeline.nn.common_corruptions` for what is theirs and what is not. The mean corruption error is eq. 1 of
section 3: of each corruption the sum of errors over severities, divided by AlexNet's, then the mean. AlexNet's errors
are those that the code of AugMix gives (google-research/augmix, ``imagenet.py``), each a mean over severities.

An image is decoded once; a pass encodes it clean and once for each corruption and severity, 76 times in all.
Shape letters: N samples, S cells (corruption and severity).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Figure, Number, Output, Table, Uses
from pipeline.core.random import SampleRandom
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import by_all
from pipeline.evals._classes import renumbered
from pipeline.evals._figures import Line, lines
from pipeline.evals._head import Classifier, HeadConfig, head_of
from pipeline.nn.common_corruptions import KNOWN, SEVERITIES, STANDARD, corrupted

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Mean error over severities. Frost (0.826572) is not here: ours is drawn, and says nothing about theirs."""
IMAGENET = 1000
"""Classes of the data that AlexNet's errors are known for."""


class Config(HeadConfig):
    """Settings of the robustness."""

    test: str = "val"
    """Stream that is damaged and classified."""
    corruptions: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(STANDARD)
    """Names; beside the fifteen there are "speckle_noise", "gaussian_blur", "spatter" and "saturate"."""
    severities: Annotated[tuple[Literal[1, 2, 3, 4, 5], ...], Field(min_length=1)] = SEVERITIES
    reference: Literal["alexnet"] | None = None
    """Whose errors "robustness/mce" is relative to; needs ImageNet's 1000 classes and all severities."""
    seed: int = 0
    """Of all chance; the same image is always damaged in the same way."""

    @field_validator("corruptions")
    @classmethod
    def _are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in KNOWN:
                raise ValueError(f"there is no corruption {name!r}; there are {', '.join(KNOWN)}")
        if len(set(names)) < len(names):
            raise ValueError("a corruption is named twice")
        return names

    @field_validator("severities")
    @classmethod
    def _are_distinct(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a severity is named twice")
        return tuple(sorted(values))


class Robustness(Evaluation):
    """Reports "robustness/clean", "robustness/top1" (the mean over all corruptions and severities), the same of each
    severity ("robustness/top1_severity3") and of each corruption ("robustness/top1_fog"), and "robustness/retained",
    the second divided by the first.

    With ``reference``, "robustness/mce": 1 is as good as AlexNet, less is better. The table "robustness/top1" and the
    figure "robustness/severities" show every cell.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What is damaged, and what the classifier is fitted on."""
        return self.config.uses(self.config.test)

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """Of clean images: the share of a class."""
        return {"robustness/clean": (1 / classes, 1.0)}

    def check(self, ctx: EvalContext) -> None:
        """AlexNet's errors are of other data than most."""
        classes = len(ctx.streams[self.config.test].classes)
        if self.config.reference is None:
            return
        if classes != IMAGENET:
            raise ConfigError(
                f'robustness.reference: "alexnet" is known on ImageNet\'s {IMAGENET} classes, and stream '
                f"{self.config.test!r} has {classes}; leave it out, and compare models by robustness/top1"
            )
        missing = [name for name in ALEXNET if name not in self.config.corruptions]
        if missing or self.config.severities != SEVERITIES:
            raise ConfigError(
                "robustness.reference: the mean corruption error is over all severities and corruptions"
                + (f"; {missing[0]!r} is missing" if missing else "; set all five severities")
            )

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Fit on all ranks, damage and classify each its share, and count.

        Raises:
            DataError: a sample is of a class that the classifier does not know.
        """
        right, split = self._right(ctx, head_of(ctx, self.config)).numpy(), self.config.test
        names, severities = self.config.corruptions, self.config.severities
        cells = right[:, 1:].reshape(len(right), len(names), len(severities))
        clean = float(right[:, 0].mean())
        yield _mean("robustness/clean", right[:, 0], split)
        yield _mean("robustness/top1", cells.mean(axis=(1, 2)), split)
        yield from (
            _mean(f"robustness/top1_severity{s}", cells[..., i].mean(1), split) for i, s in enumerate(severities)
        )
        yield from (_mean(f"robustness/top1_{name}", cells[:, i].mean(1), split) for i, name in enumerate(names))
        if clean > 0:
            yield Number("robustness/retained", float(cells.mean()) / clean, len(right), split)
        top1 = cells.mean(axis=0)
        if self.config.reference is not None:
            error = {name: 1 - float(row.mean()) for name, row in zip(names, top1, strict=True)}
            mce = float(np.mean([error[name] / theirs for name, theirs in ALEXNET.items()]))
            yield Number("robustness/mce", mce, len(right), split, better="lower")
        rows = [(name, *map(float, row), float(row.mean())) for name, row in zip(names, top1, strict=True)]
        yield Table("robustness/top1", ("corruption", *(f"severity {s}" for s in severities), "mean"), rows, split)
        yield Figure("robustness/severities", _curves(top1, clean, names, severities), _caption(top1, clean), split)

    def _right(self, ctx: EvalContext, head: Classifier) -> Tensor:
        """Whether each sample is classified rightly, clean and in each cell: bool[N,1+S], the same on every rank."""
        ids, found = by_all(lambda: self._of_rank(ctx, head))
        order, samples = gather_ragged(ids), ctx.streams[self.config.test].samples
        if not torch.equal(order.sort().values, torch.arange(samples)):
            raise DataError(f"the ranks' shares hold {len(order)} samples, not each of {samples} once")
        return gather_ragged(found)[order.argsort()]

    def _of_rank(self, ctx: EvalContext, head: Classifier) -> tuple[Tensor, Tensor]:
        """Ids int64[n] and bool[n,1+S] of this rank's share."""
        stream, device = ctx.streams[self.config.test], ctx.place.device
        cells = [(name, severity) for name in self.config.corruptions for severity in self.config.severities]
        ids, found = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 1 + len(cells), dtype=torch.bool)]
        for batch in stream:
            image, sample = batch["image"].to(device), batch["id"].to(device)
            own = batch["label"].cpu()
            label = renumbered(own, stream.classes, head.classes, f"stream {self.config.test!r}", head.whose).to(device)
            columns = [_hits(head, image, label)]
            for name, severity in cells:
                purpose = f"robustness.{name}.{severity}"
                draw = SampleRandom(self.config.seed, purpose, torch.zeros_like(sample), sample)
                columns.append(_hits(head, corrupted(image, name, severity, draw), label))
            ids.append(batch["id"].cpu())
            found.append(torch.stack(columns, dim=1).cpu())
        return torch.cat(ids), torch.cat(found)


def _hits(head: Classifier, image: Tensor, label: Tensor) -> Tensor:
    """Whether each image is taken for what it is, bool[B]."""
    scores = head.scores(head.encoder(image))
    return scores.argmax(dim=1) == label


def _mean(name: str, each: np.ndarray, split: str) -> Number:
    """The mean over samples, bool[N] or float[N], with its standard error."""
    values, n = each.astype(np.float64), len(each)
    error = math.sqrt(float(values.var()) / n)
    return Number(
        name, float(values.mean()), n, split, error, samples=each if each.dtype == bool else each.astype(np.float32)
    )


def _curves(top1: np.ndarray, clean: float, names: Sequence[str], severities: Sequence[int]) -> np.ndarray:
    """Accuracy by severity of each corruption, and the mean."""
    places = [0.0, *map(float, severities)]
    own = [Line(name.replace("_", " "), places, [clean, *row]) for name, row in zip(names, top1.tolist(), strict=True)]
    mean = Line("mean", places, [clean, *top1.mean(axis=0).tolist()], bold=True)
    return lines([*own, mean], "severity (0: clean)", "accuracy")


def _caption(top1: np.ndarray, clean: float) -> str:
    return f"Accuracy by severity; {clean:.1%} clean, {float(top1.mean()):.1%} on average over all damaged images"
