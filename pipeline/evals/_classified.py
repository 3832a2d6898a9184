"""From guesses to numbers: how often the first one is right, or one of five, and which classes are taken for which.

Shape letters: N samples, K classes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.core.evaluation import Number, Output, Table

GUESSES = 5
"""As many are counted."""
SHOWN = 50
"""Classes of the largest table of confusions."""


def guesses(scores: Tensor) -> Tensor:
    """The classes with the highest scores, the best one first.

    Args:
        scores: float[N,K]; a class that scores -inf is never guessed.

    Returns:
        int64[N,min(5,K)]; -1 where there is no further guess.
    """
    most, best = scores.topk(min(GUESSES, scores.shape[1]), dim=1)
    return best.masked_fill(most == -math.inf, -1)


def classified(
    name: str, guess: Tensor, label: Tensor, classes: Sequence[str], split: str, suffix: str = ""
) -> Iterator[Output]:
    """All that is reported of a classifier: :func:`accuracies`, then :func:`by_class`.

    Args:
        name: of the evaluation; names of outputs are "NAME/top1SUFFIX".
        guess: of each sample, from :func:`guesses`; on the CPU, as ``label`` is.
        label: what it is, int64[N].
        classes: their names, in the order of the labels.
        split: the stream.
        suffix: tells several classifiers of one evaluation apart.
    """
    yield from accuracies(name, guess, label, len(classes), split, suffix)
    yield from by_class(name, guess, label, classes, split, suffix)


def accuracies(name: str, guess: Tensor, label: Tensor, classes: int, split: str, suffix: str = "") -> Iterator[Number]:
    """ "top1", and with at least five classes "top5": with what each sample adds, and binomial standard errors."""
    right = guess == label[:, None]
    for metric, k in (("top1", 1), ("top5", GUESSES)):
        if k <= classes:
            hits = right[:, :k].any(dim=1).numpy()
            p, n = float(hits.mean()), len(hits)
            yield Number(f"{name}/{metric}{suffix}", p, n, split, math.sqrt(p * (1 - p) / n), samples=hits)


def by_class(
    name: str, guess: Tensor, label: Tensor, classes: Sequence[str], split: str, suffix: str = ""
) -> Iterator[Output]:
    """ "mean_per_class_recall", and with at most fifty classes the table "confusion".

    The first is the mean over the classes that have samples of how often the first guess is right; its standard error
    is that for the given numbers of samples. A sample that is right adds n / (K n_c) to it, n_c of n samples being of
    its class and K classes having some. The table has a row for each class, with how many of its samples were
    taken for which one.
    """
    counts = confusion(guess[:, 0], label, len(classes))
    samples = torch.bincount(label, minlength=len(classes)).numpy()
    there = samples > 0
    recall = counts.diagonal()[there] / samples[there]
    error = math.sqrt(float((recall * (1 - recall) / samples[there]).sum())) / len(recall)
    weight = len(label) / (len(recall) * np.maximum(samples, 1))
    adds = ((guess[:, 0] == label).numpy() * weight[label.numpy()]).astype(np.float32)
    yield Number(f"{name}/mean_per_class_recall{suffix}", float(recall.mean()), len(label), split, error, samples=adds)
    yield from confusion_table(name, counts, classes, split, suffix)


def confusion(guess: Tensor, label: Tensor, classes: int) -> np.ndarray:
    """int64[K,K]: how many samples of the class of a row were taken for that of a column; -1 is for none of them."""
    taken = guess >= 0
    pairs = label[taken] * classes + guess[taken]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()


def confusion_table(
    name: str, counts: np.ndarray, classes: Sequence[str], split: str, suffix: str = ""
) -> Iterator[Table]:
    """Counts of :func:`confusion` as a table, where there are at most fifty classes."""
    if len(classes) <= SHOWN:
        rows = [[own, *map(int, row)] for own, row in zip(classes, counts, strict=True)]
        yield Table(f"{name}/confusion{suffix}", ["class", *classes], rows, split)
