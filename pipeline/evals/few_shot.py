"""Few labels: a linear least-squares classifier on frozen features of k samples per class, over several draws.

The protocol of Kolesnikov et al., "Big Transfer" (ECCV 2020), as big_vision runs it: features standardised by the
samples that were drawn, targets of +1 and -1, a bias that is hardly held back, ridge regression in closed form.
Shape letters: N drawn samples, D width, K classes.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Output, Uses
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import GUESSES, confusion, confusion_table, guesses

BIAS = 100.0
"""The constant feature whose weight is the bias: large, so that a small weight is enough."""


class Config(Strict):
    """Settings of the few-shot evaluation."""

    train: str = "train"
    """Stream that the labelled samples are drawn from."""
    test: str = "val"
    """Stream that is classified."""
    shots: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)
    """Samples per class; each is reported."""
    draws: Annotated[int, Field(ge=2)] = 5
    """How often they are drawn anew: the standard error is that over draws."""
    l2: Annotated[float, Field(gt=0)] = 2.0**10
    """Strength of the ridge beside the sum of squares."""
    seed: int = 0


class FewShot(Evaluation):
    """Reports "few_shot/top1_5shot", and with at least five classes "top5_5shot", for each number of samples per class:
    the mean over draws, its standard error over draws, and the share of draws that classify each sample rightly. The
    table "few_shot/confusion_10shot" counts the guesses of all draws, for the most samples.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What is drawn from and what is classified."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"few_shot/top1_{shots}shot": (1 / classes, 1.0) for shots in self.config.shots}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks; each computes its share of the draws.

        Raises:
            ConfigError: a class has fewer samples than are to be drawn.
            DataError: a test sample is of a class that the training stream has no sample of.
        """
        train, test = (ctx.features("image", name) for name in (self.config.train, self.config.test))
        test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
        self._check(train, test)
        tasks = [(shots, draw) for shots in self.config.shots for draw in range(self.config.draws)]
        classes = len(train.classes)
        # Guesses of all ranks are added up: each is zero in all but one.
        found = torch.zeros(len(tasks), len(test.x), min(GUESSES, classes), dtype=torch.int64)
        for place in range(ctx.place.rank, len(tasks), ctx.place.world_size):
            chosen = self.draw(train.label, *tasks[place])
            scores = ridge(train.x[chosen], train.label[chosen], test.x, classes, self.config.l2)
            found[place] = guesses(scores)
        found = sum_over_ranks(found).view(-1, self.config.draws, *found.shape[1:])
        for shots, guess in zip(self.config.shots, found, strict=True):
            yield from self._accuracies(shots, guess == test.label[:, None], classes)
        most = self.config.shots.index(max(self.config.shots))
        counts = confusion(found[most, :, :, 0].flatten(), test.label.repeat(self.config.draws), classes)
        yield from confusion_table(
            "few_shot", counts, train.classes, self.config.test, f"_{max(self.config.shots)}shot"
        )

    def _accuracies(self, shots: int, right: Tensor, classes: int) -> Iterator[Number]:
        """Of hits bool[draws,N,5] of the guesses."""
        for name, k in (("top1", 1), ("top5", GUESSES)):
            if k <= classes:
                hits = right[:, :, :k].any(dim=2)
                share, drawn = hits.float().mean(dim=0), hits.double().mean(dim=1)
                error = float(drawn.std()) / math.sqrt(len(drawn))
                yield Number(
                    f"few_shot/{name}_{shots}shot",
                    float(drawn.mean()),
                    len(share),
                    self.config.test,
                    error,
                    samples=share.numpy(),
                )

    def draw(self, label: Tensor, shots: int, draw: int) -> Tensor:
        """Places of ``shots`` samples of each class that occurs, int64; more shots of a draw hold the fewer ones."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw)
        order = torch.randperm(len(label), generator=generator)
        drawn = [order[label[order] == number][:shots] for number in label.unique()]
        return torch.cat(drawn)

    def _check(self, train: Features, test: Features) -> None:
        counts = torch.bincount(train.label, minlength=len(train.classes))
        missing = [train.classes[number] for number in test.label.unique().tolist() if not counts[number]]
        if missing:
            raise DataError(
                f"stream {self.config.test!r} has samples of {missing[0]!r}, of which stream {self.config.train!r} has "
                "none to learn from; measure on data of the same classes"
            )
        fewest = int(counts[counts > 0].min())
        if fewest < max(self.config.shots):
            name = train.classes[int(torch.where(counts == fewest)[0][0])]
            raise ConfigError(
                f"few_shot.shots: {max(self.config.shots)} samples of each class asked for, but stream "
                f"{self.config.train!r} has only {fewest} of {name!r}"
            )


def ridge(x: Tensor, label: Tensor, test: Tensor, classes: int, l2: float) -> Tensor:
    """Scores of test samples by the least-squares classifier of few samples, in float64.

    Args:
        x: features that are learnt from, [N,D].
        label: their classes, int64[N].
        test: features that are classified, [M,D].
        classes: K.
        l2: W minimises |X W - Y|^2 + l2 |W|^2, with Y of +1 for a sample's class and -1 for the others.

    Returns:
        float64[M,K]; a class without a sample scores -inf.
    """
    mean, std = x.double().mean(dim=0), x.double().std(dim=0, unbiased=False) + 1e-5

    def prepared(features: Tensor) -> Tensor:
        return functional.pad((features.double() - mean) / std, (0, 1), value=BIAS)

    known, target = prepared(x), 2.0 * functional.one_hot(label, classes).double() - 1.0
    # In the smaller of the two spaces: X^T (X X^T + l2)^-1 Y where there are fewer samples than features.
    if len(known) < known.shape[1]:
        gram = known @ known.T
        weights = known.T @ torch.linalg.solve(gram + l2 * torch.eye(len(gram), dtype=gram.dtype), target)
    else:
        gram = known.T @ known
        weights = torch.linalg.solve(gram + l2 * torch.eye(len(gram), dtype=gram.dtype), known.T @ target)
    scores = prepared(test) @ weights
    unseen = torch.bincount(label, minlength=classes) == 0
    return scores.masked_fill(unseen, -math.inf)
