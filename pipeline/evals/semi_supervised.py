"""Few labels and many unlabelled samples on frozen features: scikit-learn's self-training and label spreading.

- Self-training: a logistic regression labels what it is sure of, and is fitted again (Yarowsky, "Unsupervised Word
  Sense Disambiguation Rivaling Supervised Methods", ACL 1995).
- Label spreading: labels flow along nearest neighbours (Zhou et al., "Learning with Local and Global Consistency",
  NIPS 2003).
- Beside them the same logistic regression on the labelled samples alone.

Labels of k samples per class are shown, over several draws; the others of the training stream are unlabelled. Shape
letters: N training samples, M test samples, D width, K classes.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Output, Uses
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._classes import in_classes_of
from pipeline.evals._probe import Scale, check_samples, scaled

METHODS = ("logistic_regression", "self_training", "label_spreading")
STEPS = 300
"""Of label spreading, as many as neighbours can lie between a sample and a label."""
UNKNOWN = -1
"""scikit-learn's label of unlabelled samples."""


class Config(Strict):
    """Settings of learning from few labels on features."""

    train: str = "train"
    """Stream whose labels are hidden, but for those that are drawn."""
    test: str = "val"
    """Stream that is classified."""
    shots: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 5, 10)
    """Labels per class; each is reported."""
    draws: Annotated[int, Field(ge=2)] = 5
    """How often they are drawn anew: the standard error is that over draws."""
    scale: Scale = "standardise"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Of self-training: answers that are surer become labels."""
    neighbours: Annotated[int, Field(ge=1)] = 7
    """Of label spreading."""
    c: Annotated[float, Field(gt=0)] = 1.0
    """Inverse strength of the logistic regression's penalty."""
    seed: int = 0


class SemiSupervised(Evaluation):
    """Reports "semi_supervised/logistic_regression_5shot", "self_training_5shot" and "label_spreading_5shot", for each
    number of labels per class: top-1 accuracy on the test stream, mean over draws.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What is learnt from and what is classified."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"semi_supervised/{name}_{k}shot": (1 / classes, 1.0) for name in METHODS for k in self.config.shots}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks; each computes its share of the draws.

        Raises:
            ConfigError: a class has fewer samples than labels are to be shown.
            DataError: a test sample is of a class that the training stream has no sample of.
        """
        config = self.config
        train, test = (ctx.features("image", name) for name in (config.train, config.test))
        test = in_classes_of(test, train.classes, config.test, f"stream {config.train!r}")
        self._check(train, test)
        x, other = scaled(config.scale, train.x, test.x)
        tasks = [(shots, draw) for shots in config.shots for draw in range(config.draws)]
        # Guesses of all ranks are added up: each is zero in all but one.
        found = torch.zeros(len(tasks), len(METHODS), len(other), dtype=torch.int64)
        for place in range(ctx.place.rank, len(tasks), ctx.place.world_size):
            shown = self.hidden(train.label, *tasks[place])
            for number, (model, from_all) in enumerate(self.models()):
                chosen = torch.arange(len(x)) if from_all else (shown != UNKNOWN).nonzero().squeeze(1)
                found[place, number] = guess(model, x[chosen], shown[chosen], other)
            ctx.show("semi_supervised", place + 1, len(tasks))
        found = sum_over_ranks(found).view(len(config.shots), config.draws, len(METHODS), -1)
        for shots, drawn in zip(config.shots, found == test.label, strict=True):
            for number, name in enumerate(METHODS):
                hits = drawn[:, number].double()
                each, error = hits.mean(dim=1), float(hits.mean(dim=1).std()) / math.sqrt(config.draws)
                name, share = f"semi_supervised/{name}_{shots}shot", hits.mean(dim=0).float().numpy()
                yield Number(name, float(each.mean()), len(other), config.test, error, samples=share)

    def models(self) -> Iterator[tuple[Any, bool]]:
        """Of scikit-learn, in the order of METHODS, and whether each learns from unlabelled samples too."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

        plain = LogisticRegression(C=self.config.c, max_iter=1000)
        # Labels decay by a factor of five from neighbour to neighbour: the usual tolerance would stop them after four.
        spreading = LabelSpreading(kernel="knn", n_neighbors=self.config.neighbours, max_iter=STEPS, tol=0.0)
        yield from (
            (plain, False),
            (SelfTrainingClassifier(plain, threshold=self.config.threshold), True),
            (spreading, True),
        )

    def hidden(self, label: Tensor, shots: int, draw: int) -> Tensor:
        """Labels int64[N], but for ``shots`` of each class unknown; more shots of a draw show the fewer ones too."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw)
        order = torch.randperm(len(label), generator=generator)
        shown = torch.full_like(label, UNKNOWN)
        for number in label.unique():
            chosen = order[label[order] == number][:shots]
            shown[chosen] = label[chosen]
        return shown

    def _check(self, train: Features, test: Features) -> None:
        check_samples(train, test, self.config.train, self.config.test)
        counts = torch.bincount(train.label, minlength=len(train.classes))
        fewest = int(counts[counts > 0].min())
        if fewest < max(self.config.shots):
            name = train.classes[int(torch.where(counts == fewest)[0][0])]
            raise ConfigError(
                f"semi_supervised.shots: {max(self.config.shots)} labels of each class asked for, but stream "
                f"{self.config.train!r} has only {fewest} samples of {name!r}"
            )
        if len(train.x) <= self.config.neighbours:
            raise ConfigError(
                f"semi_supervised.neighbours = {self.config.neighbours}: stream {self.config.train!r} has "
                f"{len(train.x)} samples, so none has so many others; take fewer"
            )


def guess(model: Any, x: Tensor, shown: Tensor, test: Tensor) -> Tensor:
    """Classes of test samples [M,D], int64[M], by a model that is fitted on samples [N,D] and what is shown of them."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # that all are labelled, or that rounds have not converged
        model.fit(x.double().numpy(), shown.numpy())
        p = np.asarray(model.predict_proba(test.double().numpy()))
    best = np.asarray(model.classes_, dtype=np.int64)[p.argmax(axis=1)]
    # No label has spread to where such a sample is: it is not taken for anything.
    return torch.from_numpy(np.where(np.isfinite(p).all(axis=1), best, UNKNOWN))
